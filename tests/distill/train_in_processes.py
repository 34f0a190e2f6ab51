"""Trains a small student on 32 sentences, 3 steps: MODEL OUTPUT CHANGES, alone or under torchrun.

CHANGES: of DistillationArguments, as JSON. Prints how often the teacher ran.
"""

import json
import sys

import datasets
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdfast import DistillationArguments, DistillationTrainer
from kdfast.distill.data import DistillationCollator, tokenize
from kdfast.distill.models import cut_student


def main(model, output, changes):
    changes = json.loads(changes)
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
    if changes["recipe"] == "embedding":  # models without a head
        teacher, student = teacher.bert, student.bert
    ran = []
    teacher.register_forward_pre_hook(lambda *_: ran.append(1))
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=DistillationArguments(
            output_dir=output, max_steps=3, use_cpu=True, report_to="none", learning_rate=1e-2,
            optim="sgd", weight_decay=0.1, save_strategy="no", logging_steps=1, disable_tqdm=True,
            **changes,
        ),
        train_dataset=tokenize(rows, tokenizer, 32),
        data_collator=DistillationCollator(tokenizer),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert not isinstance(trainer.teacher, torch.nn.parallel.DistributedDataParallel)
    # At once, on a line of its own: processes write between the parts of each other's prints.
    sys.stdout.write(f"\nteacher ran {len(ran)}\n")
    trainer.save_model(output)
    # Together, in order: a process that leaves first tears the other's connection down.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
