"""Two processes against one: gloo on this machine's CPU."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
    import sys
    import datasets, torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from kdfast import DistillationArguments, DistillationTrainer
    from kdfast.distill.data import DistillationCollator, tokenize
    from kdfast.distill.models import cut_student

    model, output, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
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
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=DistillationArguments(
            output_dir=output, recipe="universal", max_steps=3, use_cpu=True, report_to="none",
            per_device_train_batch_size=batch, learning_rate=1e-2, optim="sgd",
            save_strategy="no", logging_steps=1, disable_tqdm=True,
        ),
        train_dataset=tokenize(rows, tokenizer, 32),
        data_collator=DistillationCollator(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(output)
    # Together, in order: a process that leaves first tears the other's connection down.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_train_what_one_trains_on_the_joined_batch(tiny_bert, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    port = 29500 + os.getpid() % 1000
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    for folder, arguments, batch in (("one", [], 8), ("two", launch, 4)):
        result = subprocess.run(
            [sys.executable, *arguments, script, tiny_bert, tmp_path / folder, str(batch)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr[-6000:]
    for name in ("model.safetensors", "kdfast_state.safetensors"):
        one, two = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)
