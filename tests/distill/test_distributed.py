"""Two processes against one: gloo on this machine's CPU."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
    import json, os, sys
    import datasets, torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from kdfast import DistillationArguments, DistillationTrainer
    from kdfast.distill.data import DistillationCollator, tokenize
    from kdfast.distill.models import cut_student

    model, output, batch, recipe, options = sys.argv[1:]
    torch.set_num_threads(1)
    teacher = AutoModelForSequenceClassification.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = ["good film", "bad plot", "the film is fine", "awful film was awful"] * 8
    rows = datasets.Dataset.from_dict({"text": texts, "label": [1, 0, 1, 0] * 8})
    torch.manual_seed(1)
    student = cut_student(teacher, 2, label_names=["neg", "pos"])
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if recipe == "embedding":  # models without a head
        teacher, student = teacher.bert, student.bert
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=DistillationArguments(
            output_dir=output, recipe=recipe, recipe_options=json.loads(options), max_steps=3,
            use_cpu=True, report_to="none", per_device_train_batch_size=int(batch),
            learning_rate=1e-2, optim="sgd", weight_decay=0.1,
            save_strategy="no", logging_steps=1, disable_tqdm=True,
        ),
        train_dataset=tokenize(rows, tokenizer, 32),
        data_collator=DistillationCollator(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    assert not isinstance(trainer.teacher, torch.nn.parallel.DistributedDataParallel)
    trainer.save_model(output)
    # Together, in order: a process that leaves first tears the other's connection down.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        # Means over tokens, stages of which the first reach no head, weight decay meanwhile.
        ("internal", '{"schedule": "stacked", "cosine_rows": "tokens"}'),
        # Outputs other than logits, a pooler that no loss reaches.
        ("embedding", "{}"),
        # Losses that couple samples, a memory, parameters of the recipe's own.
        (
            "custom",
            '{"losses": [{"loss": "local"}, {"loss": "global", "clusters": 4, "weight": 0.1},'
            ' {"loss": "rkd_angle"}, {"loss": "hidden_cka"}, {"loss": "pseudo_projection"}]}',
        ),
    ],
)
def test_two_processes_train_what_one_trains_on_the_joined_batch(
    recipe, options, tiny_bert, tmp_path
):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    port = 29500 + os.getpid() % 1000
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    for folder, arguments, batch in (("one", [], 8), ("two", launch, 4)):
        command = [sys.executable, *arguments, script, tiny_bert, tmp_path / folder, str(batch)]
        result = subprocess.run(
            [*command, recipe, options], capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr[-6000:]
    names = ["model.safetensors", "kdfast_state.safetensors"]
    for name in names[:1] if recipe == "embedding" else names:
        one, two = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)
