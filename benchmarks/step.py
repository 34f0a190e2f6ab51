"""The whole training step: what internal distillation costs beside soft labels.

A row is a pair of models, a batch, a length and a method. Its variants, taken in turn, round after
round:

    fine-tuning    the student on labels, no teacher
    soft labels    teacher forward, KL of the outputs
    eager          soft labels and the method's losses as plain PyTorch
    compile        the same losses, each part of them by torch.compile
    kdfast         the same losses on kdfast's operators
    ... cached     soft labels, eager and kdfast, with what they need of the teacher read from files
    ... graphs     soft labels and kdfast with teacher and losses replayed as CUDA graphs, on a GPU

All are DistillationTrainers on equal students; a step is the trainer's own training step (teacher,
student, losses, backward), clipping, optimizer and schedule, of one batch that is there. Attention
dropout is 0. What counts are the ratios within rounds of kdfast to soft labels and to eager. The
loss and the student's gradient of eager are what is right for the others; where eager does not fit,
those of one sample of the batch.

The results are as in `harness`, but for `suite` ("step") and the rows:

    rows  [{name, pair, method, dtype, shape: {B, N}, tokens: valid ones of the batch,
            skipped: why nothing was run, such as too little memory | null,
            variants: {name: {seconds: [one a round], loss: of the first step, before any update,
                              error: {loss, gradient: |x - eager| / |eager|} | null,
                              parts: {part: [seconds of steps among the first rounds]} (see
                                      kdfast.distill.profile),
                              memory: peak bytes of a step, of a process of its own | null,
                              skipped: why it was not run | null}},
            others, wrong}]
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.benchmarks import harness
from kdfast.errors import InputError

TITLE = "Whole training steps"
FILES = ("step.md", "step_parts.png")
CACHED = " cached"
GRAPHS = " graphs"
VARIANTS = (
    *("fine-tuning", "soft labels", "eager", "compile", "kdfast"),
    *(f"{name}{CACHED}" for name in ("soft labels", "eager", "kdfast")),
    *(f"{name}{GRAPHS}" for name in ("soft labels", "kdfast")),
)
# With every layer mapped. The structures of fsd are on the penultimate layer, as in the paper.
METHODS: dict[str, dict[str, Any]] = {
    "internal": {"recipe": "internal", "cosine_rows": "tokens"},
    "fsd": {"recipe": "fsd"},
    "universal": {"recipe": "universal", "label_share": 0.0},
}
ALL = "all three"
BASELINES = ("fine-tuning", "soft labels")
TOLERANCE = {
    "float32": {"loss": 1e-4, "gradient": 1e-3},
    "bfloat16": {"loss": 3e-2, "gradient": 0.1},
}
PROFILED = 3  # rounds in which each variant's step is also taken apart


@dataclass(frozen=True)
class Row:
    """tokens: None for the real sentences as they are, else sentences joined to that length."""

    pair: str
    method: str
    batch: int
    tokens: int | None
    dtype: str = "float32"
    memory: bool = False
    without: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        length = "real sentences" if self.tokens is None else f"N{self.tokens}"
        return f"{self.pair} {self.method} B{self.batch} {length} {self.dtype}"


def _rows(pair: str, methods: Sequence[str], batch: int, tokens: int | None, **more: Any) -> Any:
    return [Row(pair, method, batch, tokens, **more) for method in methods]


EACH = (*METHODS, ALL)
_HALF: dict[str, Any] = {"dtype": "bfloat16"}
ROWS = {
    "cpu": [
        *_rows("minilm", EACH, 32, 128, memory=True),
        *_rows("minilm", ("internal",), 32, 128, **_HALF),
        *_rows("quickstart", ("internal",), 32, None),
        *_rows("minilm", ("internal", ALL), 32, None),
        *_rows("minilm", ("internal",), 8, 128),
        *_rows("minilm", ("internal",), 32, 256),
        *_rows("minilm", ("internal",), 32, 512, memory=True),
        *_rows("bert", ("internal",), 8, 128),
    ],
    "cuda": [
        *_rows("bert", EACH, 256, 128, **_HALF, memory=True),
        *_rows("bert", EACH, 32, 512, **_HALF, memory=True),
        *_rows("bert", ("internal",), 32, 4096, **_HALF, memory=True),
        *_rows("bert", ("internal",), 32, 128, **_HALF),
        *_rows("bert", ("internal",), 64, 512, **_HALF),
        *_rows("bert", ("internal",), 32, 128),
    ],
    "quick": [
        Row("tiny", "internal", 4, 16, without=("compile",)),
        Row("tiny", ALL, 4, 16, without=("compile",)),
    ],
}


# Models and batches


@dataclass
class Pair:
    """A teacher, how its students are made, and batches for both."""

    teacher: Any
    layers: int | list[int]
    tokenizer: Any = None
    frozen: bool = False  # the student's embeddings

    def student(self) -> Any:
        from kdfast.distill.models import cut_student, freeze_embeddings

        torch.manual_seed(0)
        student = cut_student(self.teacher, self.layers, label_names=["no", "yes"])
        if self.frozen:
            freeze_embeddings(student)
        return student


def make_pair(name: str, tokens: int | None) -> Pair:
    """bert: BERT-base of random weights, 12 layers to 6. minilm: the demo's model, 6 to 3 (384
    wide). quickstart: the student of `make distill`, 2 of its layers and frozen embeddings. tiny:
    for tests, 4 to 2."""
    from transformers import BertConfig, BertForSequenceClassification

    from kdfast.distill.models import load_model, load_tokenizer

    torch.manual_seed(0)
    if name in ("minilm", "quickstart"):
        teacher = load_model("demo:minilm", label_names=["no", "yes"])
        layers, frozen = (3, False) if name == "minilm" else ([0, 3], True)
        return Pair(teacher, layers, load_tokenizer("demo:minilm"), frozen)
    positions = max(512, tokens or 0)
    if name == "bert":
        config = BertConfig(max_position_embeddings=positions)
        return Pair(BertForSequenceClassification(config).eval(), 6)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        vocab_size=128, max_position_embeddings=positions,
    )  # fmt: skip
    return Pair(BertForSequenceClassification(config).eval(), 2)


def make_batch(pair: Pair, row: Row) -> dict[str, Tensor]:
    """Real sentences where the pair has a tokenizer, as they are (padded to the longest) or joined
    and cut to whole rows; otherwise random tokens."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (row.batch,), generator=generator)
    if pair.tokenizer is None:
        if row.tokens is None:
            raise InputError(f"the pair {row.pair} has no tokenizer, so no real sentences")
        words = pair.teacher.config.vocab_size
        ids = torch.randint(5, words, (row.batch, row.tokens), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    from kdfast.distill.demo import demo_sentences

    texts = list(demo_sentences("reviews")["text"])
    if row.tokens is None:
        found = pair.tokenizer(texts[: row.batch], padding=True, truncation=True, max_length=64)
        return {k: torch.tensor(v) for k, v in found.items()} | {"labels": labels}
    first, last = pair.tokenizer.cls_token_id, pair.tokenizer.sep_token_id
    running = iter(
        token
        for text in texts
        for token in pair.tokenizer(text, add_special_tokens=False)["input_ids"]
    )
    ids = torch.tensor(
        [[first, *(next(running) for _ in range(row.tokens - 2)), last] for _ in range(row.batch)]
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def recipe_of(variant: str, method: str, tokens: int) -> tuple[str, dict[str, Any]]:
    """Name and options of the recipe that a variant trains."""
    if variant == "fine-tuning":
        return "labels", {}
    if variant.startswith("soft labels"):
        return "soft_labels", {}
    if method != ALL:
        options = dict(METHODS[method])
        if method == "fsd":
            options["max_length"] = tokens
        return options.pop("recipe"), options
    # Soft labels once.
    parts = [{**options, "soft_label_weight": 0.0} for options in METHODS.values()]
    del parts[0]["soft_label_weight"]
    return "custom", {"losses": parts, "max_length": tokens}


@dataclass
class Outcome:
    """loss, and gradient [P] of the student's parameters, float32."""

    loss: float
    gradient: Tensor

    def error(self, right: Outcome) -> dict[str, float]:
        # 1 − cos of states that are nearly equal is rounding.
        loss = abs(self.loss - right.loss) / max(abs(right.loss), 0.01)
        return {
            "loss": loss,
            "gradient": float((self.gradient - right.gradient).norm() / right.gradient.norm()),
        }


def wrong(error: dict[str, float], dtype: str) -> list[str]:
    """What is further from eager than it may be."""
    return [
        f"its {what} is off by {error[what]:.1e} of that of eager losses"
        for what, most in TOLERANCE[dtype].items()
        if not error[what] <= most  # nor NaN
    ]


class Stepper:
    """A trainer at the start of its training, which takes one step of a batch at a time."""

    def __init__(
        self,
        pair: Pair,
        row: Row,
        variant: str,
        batch: dict[str, Tensor],
        device: torch.device,
    ) -> None:
        from datasets import Dataset
        from transformers import default_data_collator

        from kdfast.distill.trainer import DistillationArguments, DistillationTrainer

        name, options = recipe_of(variant, row.method, batch["input_ids"].shape[1])
        self.folder = tempfile.TemporaryDirectory()
        cuda = device.type == "cuda"
        self.trainer: Any = DistillationTrainer(
            model=pair.student(),
            teacher=None if variant == "fine-tuning" else pair.teacher,
            args=DistillationArguments(
                output_dir=self.folder.name, recipe=name, recipe_options=options, max_steps=1000,
                per_device_train_batch_size=row.batch, learning_rate=1e-5, report_to="none",
                bf16=row.dtype == "bfloat16" and not cuda, use_cpu=not cuda, disable_tqdm=True,
                teacher_cache=self.folder.name if variant.endswith(CACHED) else None,
                cuda_graphs=variant.endswith(GRAPHS),
            ),
            train_dataset=Dataset.from_dict({k: v.tolist() for k, v in batch.items()}),
            data_collator=default_data_collator,
        )  # fmt: skip
        trainer = self.trainer
        if row.dtype == "bfloat16" and cuda:
            models: list[Any] = [trainer.model, pair.teacher]
            for model in models:
                model.to(torch.bfloat16)
        for part in trainer.recipe.fitted.values():
            part.stand_in()  # its values do not change the time
        trainer.recipe.train()
        trainer.create_optimizer_and_scheduler(1000)
        trainer.model_wrapped, trainer.optimizer, trainer.lr_scheduler = (
            trainer.accelerator.prepare(trainer.model, trainer.optimizer, trainer.lr_scheduler)
        )
        trainer.current_gradient_accumulation_steps = 1
        if variant.endswith(CACHED):
            with contextlib.redirect_stdout(io.StringIO()):
                trainer._fill_cache()
        # As training gets it: on the device, with what the host knows of its padding.
        self.batch: Any = next(iter(trainer.get_train_dataloader()))

    def step(self) -> None:
        trainer = self.trainer
        trainer.training_step(trainer.model_wrapped, dict(self.batch))
        learned = [*trainer.model.parameters(), *trainer.recipe.parameters()]
        trainer.accelerator.clip_grad_norm_(learned, trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.model.zero_grad()

    def outcome(self) -> Outcome:
        """Of the batch as it stands, without dropout; nothing is updated."""
        trainer = self.trainer
        dropouts = [m for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)]
        shares = [module.p for module in dropouts]
        try:
            for module in dropouts:
                module.p = 0.0
            loss = float(trainer.training_step(trainer.model_wrapped, dict(self.batch)))
            found = [
                p.grad.float().flatten() for p in trainer.model.parameters() if p.grad is not None
            ]
            return Outcome(loss, torch.cat(found).cpu())
        finally:
            for module, share in zip(dropouts, shares, strict=True):
                module.p = share
            trainer.model.zero_grad()
            trainer.recipe.zero_grad()

    def close(self) -> None:
        self.trainer.close()
        self.folder.cleanup()


# The losses as plain PyTorch


def eager_attention_kl(
    query_s: Sequence[Tensor],
    key_s: Sequence[Tensor],
    query_t: Sequence[Tensor],
    key_t: Sequence[Tensor],
    *,
    attention_mask: Tensor | None,
    scale_s: float,
    scale_t: float,
    **_: Any,
) -> Tensor:
    """[pairs]: mean over heads and valid rows of KL(t ‖ s)."""
    hidden = None if attention_mask is None else ~attention_mask.bool()[:, None, None, :]

    def log_map(query: Tensor, key: Tensor, scale: float) -> Tensor:
        scores = query @ key.mT * scale
        if hidden is not None:
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        return F.log_softmax(scores, dim=-1)

    losses = []
    for q_s, k_s, q_t, k_t in zip(query_s, key_s, query_t, key_t, strict=True):
        with torch.no_grad():
            log_t = log_map(q_t, k_t, scale_t)
        log_s = log_map(q_s, k_s, scale_s)
        rows = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
        if attention_mask is None:
            losses.append(rows.mean())
        else:
            valid = attention_mask[:, None].to(rows.dtype)
            losses.append((rows * valid).sum() / (valid.sum() * rows.shape[1]))
    return torch.stack(losses)


def _centred(x: Tensor, mask: Tensor | None) -> Tensor:
    """In the dtype of x, in which the products are then taken; means are float32."""
    own, x = x.dtype, x.float()
    if mask is None:
        return (x - x.mean(-2, keepdim=True)).to(own)
    valid = mask.unsqueeze(-1).to(x.dtype)
    mean = (x * valid).sum(-2, keepdim=True) / valid.sum(-2, keepdim=True)
    return ((x - mean) * valid).to(own)


def eager_cka(
    layers_s: Sequence[Tensor], layers_t: Sequence[Tensor], *, mask: Tensor | None = None, **_: Any
) -> Tensor:
    """[pairs, ...]: biased linear CKA of each pair by centred Gram matrices."""
    found = []
    for x, y in zip(layers_s, layers_t, strict=True):
        x, y = _centred(x, mask), _centred(y, mask)
        if x.shape[-2] > x.shape[-1]:  # the products of features are the smaller ones
            parts = [(a.mT @ b).float().square() for a, b in ((x, y), (x, x), (y, y))]
        else:
            k, c = (x @ x.mT).float(), (y @ y.mT).float()
            parts = [a * b for a, b in ((k, c), (k, k), (c, c))]
        cross, own_s, own_t = (part.sum((-2, -1)) for part in parts)
        found.append(cross / (own_s * own_t).sqrt())
    return torch.stack(found)


def eager_memory_cka(layer: Tensor, gram: Tensor) -> Tensor:
    """CKA with a layer whose centred Gram matrix is kept, as it never changes."""
    x = _centred(layer, None)
    k = (x @ x.mT).float()
    return (k * gram).sum() / (k.square().sum() * gram.square().sum()).sqrt()


class EagerMemory:
    """Distances and cosines of samples [B, N], extended by zeros, to a memory [C, F]."""

    def __init__(self, x: Tensor, memory: Tensor) -> None:
        missing = memory.shape[1] - x.shape[1]
        self.x, self.memory = F.pad(x, (0, missing)) if missing else x, memory

    @classmethod
    def of(cls, x: Tensor, memory: Tensor) -> EagerMemory:
        return cls(x, memory)

    def distances(self, eps: float) -> Tensor:
        return torch.cdist(self.x, self.memory)

    def cosines(self) -> Tensor:
        return F.normalize(self.x) @ F.normalize(self.memory).T


class CompiledMemory(EagerMemory):
    def distances(self, eps: float) -> Tensor:
        found: Tensor = _compiled(EagerMemory.distances)(self, eps)
        return found

    def cosines(self) -> Tensor:
        found: Tensor = _compiled(EagerMemory.cosines)(self)
        return found


def eager_layer_projection_loss(
    layers_s: Sequence[Tensor],
    layers_t: Sequence[Tensor],
    *,
    objective: str,
    scale: float,
    temperature: float,
    **_: Any,
) -> Tensor:
    """Mean over student layers and rows, by KL of logits at a temperature."""
    assert objective == "kl"
    h, g = (torch.stack(list(layers), -2) for layers in (layers_s, layers_t))
    mixed = (h @ g.mT * scale).softmax(-1) @ g
    log_s, log_t = ((x / temperature).log_softmax(-1) for x in (h, mixed))
    return F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1).mean()


def eager_distance(
    layers_s: Sequence[Tensor],
    layers_t: Sequence[Tensor],
    *,
    objective: str,
    mask: Tensor | None,
    **_: Any,
) -> Tensor:
    """Mean over pairs and valid rows of 1 − cosine, or of the squared error."""
    losses = []
    for student, teacher in zip(layers_s, layers_t, strict=True):
        if objective == "cosine":
            rows = 1 - F.cosine_similarity(student, teacher, dim=-1)
        else:
            rows = (student - teacher).square().mean(-1)
        if mask is None:
            losses.append(rows.mean())
        else:
            valid = mask.to(rows.dtype)
            losses.append((rows * valid).sum() / valid.sum())
    return torch.stack(losses).mean()


@contextlib.contextmanager
def losses_of(variant: str) -> Iterator[None]:
    """The loss modules call plain or compiled PyTorch instead of kdfast's operators."""
    variant = variant.removesuffix(CACHED)
    if variant not in ("eager", "compile"):
        yield
        return
    from kdfast.losses import attention, hidden, memory, projection, structure

    def made(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return function if variant == "eager" else _compiled(function)

    class Teacher:
        """CKATeacher of one memory."""

        def __init__(self, layer: Tensor, **_: Any) -> None:
            centred = _centred(layer, None)
            self.gram = centred @ centred.mT

        def cka(self, layer: Tensor) -> Tensor:
            return made(eager_memory_cka)(layer, self.gram)

    places = (
        (attention, "attention_kl", made(eager_attention_kl)),
        (structure, "cka", made(eager_cka)),
        (projection, "layer_projection_loss", made(eager_layer_projection_loss)),
        (hidden, "layer_projection_loss", made(eager_distance)),
        (memory, "CKATeacher", Teacher),
        (memory, "SamplesAndMemory", EagerMemory if variant == "eager" else CompiledMemory),
    )
    own = [getattr(module, name) for module, name, _ in places]
    for module, name, function in places:
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name, _), function in zip(places, own, strict=True):
            setattr(module, name, function)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False)


# Measuring


def measure(
    row: Row,
    device: torch.device,
    *,
    seconds: float,
    rounds: tuple[int, int],
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """A row of the results. `seconds` is what the rounds may take, `rounds` their least and most
    number."""
    lean, dense = needed(row)
    if reason := unfit(row, device) or harness.too_large(lean, device):
        return {**described(row), "shape": None, "tokens": None, "skipped": reason,
                "variants": {}, "others": None, "wrong": []}  # fmt: skip
    torch.compiler.reset()
    _compiled.cache_clear()
    pair = make_pair(row.pair, row.tokens)
    pair.teacher.to(device)
    batch = make_batch(pair, row)
    variants: dict[str, dict[str, Any]] = {}
    steppers: dict[str, Stepper] = {}
    outcomes: dict[str, Outcome] = {}
    amiss: list[str] = []
    for name in VARIANTS:
        if name in row.without or (name.endswith(GRAPHS) and device.type != "cuda"):
            continue
        say(name)
        record: dict[str, Any] = {
            "seconds": [], "loss": None, "error": None, "parts": None, "memory": None,
            "skipped": None,
        }  # fmt: skip
        variants[name] = record
        # A GPU says so itself, where a CPU may be driven out of memory.
        if name.startswith(("eager", "compile")) and device.type == "cpu":
            record["skipped"] = harness.too_large(lean + dense, device)
            if record["skipped"]:
                continue
        stepper = None
        try:
            stepper = Stepper(pair, row, name, batch, device)
            with losses_of(name):
                outcome = stepper.outcome()
                record["loss"] = outcome.loss
                if not name.startswith(BASELINES):
                    outcomes[name] = outcome
                for _ in range(2):  # the first also allocates what the optimizer keeps
                    stepper.step()
            steppers[name] = stepper
        except Exception as error:
            record["skipped"] = _reason(error)
            if name.startswith("kdfast"):
                amiss.append(f"{name}: {record['skipped']}")
            if stepper is not None:
                stepper.close()
            del error
        stepper = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if "kdfast" in outcomes and "eager" not in outcomes and "eager" not in row.without:
        say("one sample")
        try:
            outcomes = _of_one_sample(pair, row, batch, device)
        except Exception as error:
            outcomes = {}
            amiss.append(f"one sample: {_reason(error)}")
    right = outcomes.pop("eager", None)
    for name, outcome in outcomes.items():
        if right is not None:
            found = outcome.error(right)
            variants[name]["error"] = found
            amiss += [f"{name}: {text}" for text in wrong(found, row.dtype)]
    del outcomes, right
    if row.memory:
        for name in steppers:
            say(f"{name}: memory")
            variants[name]["memory"] = _peak(row, name, device)
    gc.disable()
    others = harness.OtherWork() if device.type == "cpu" else None
    try:
        for number, order in enumerate(harness.interleaved(list(steppers), rounds[1])):
            say(f"round {number + 1}")
            for name in order:
                if name not in steppers:  # it failed in an earlier round
                    continue
                try:
                    _round(steppers[name], name, variants[name], number < PROFILED, device)
                except Exception as error:
                    steppers.pop(name).close()
                    variants[name] |= {"seconds": [], "parts": None, "skipped": _reason(error)}
                    amiss += [f"{name}: {_reason(error)}"] * name.startswith("kdfast")
            spent = sum(sum(v["seconds"]) for v in variants.values())
            if number + 1 >= rounds[0] and spent * (number + 2) / (number + 1) > seconds:
                break
    finally:
        gc.enable()
    for stepper in steppers.values():
        stepper.close()
    return {
        **described(row),
        "shape": {"B": row.batch, "N": int(batch["input_ids"].shape[1])},
        "tokens": int(batch["attention_mask"].sum()),
        "skipped": None,
        "variants": variants,
        "others": others and others.share(),
        "wrong": amiss,
    }


def unfit(row: Row, device: torch.device) -> str | None:
    """Why a row is left out on this device: emulated, bfloat16 takes many times float32's time."""
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    if row.dtype == "bfloat16" and device.type == "cpu" and not known():
        return "skipped: bfloat16 on a CPU that is not known to have instructions for it"
    return None


def _of_one_sample(
    pair: Pair, row: Row, batch: dict[str, Tensor], device: torch.device
) -> dict[str, Outcome]:
    """Of eager and kdfast, for the first sample of a batch that is too large for eager; empty where
    that does not fit either."""
    one = replace(row, batch=1)
    if harness.too_large(sum(needed(one)), device):
        return {}
    found = {}
    for name in ("eager", "kdfast"):
        stepper = Stepper(pair, one, name, {k: x[:1] for k, x in batch.items()}, device)
        try:
            with losses_of(name):
                found[name] = stepper.outcome()
        except Exception as error:
            if not harness.out_of_memory(error):
                raise
            return {}
        finally:
            stepper.close()
    return found


def _round(
    stepper: Stepper, name: str, variant: dict[str, Any], profiled: bool, device: torch.device
) -> None:
    from kdfast.distill.profile import profile

    with losses_of(name):
        variant["seconds"].append(timed(stepper.step, device))
        if profiled:
            apart = profile(stepper.trainer, [dict(stepper.batch)])
            parts = variant["parts"] or {part: [] for part in apart}
            variant["parts"] = {k: [*parts[k], *v] for k, v in apart.items()}
            if name.endswith(GRAPHS):  # which a profile lets go
                stepper.step()


def _reason(error: Exception) -> str:
    return "out of memory" if harness.out_of_memory(error) else harness.one_line(error)


def described(row: Row) -> dict[str, Any]:
    """What the results say of a row before anything is measured."""
    return {
        "name": row.name,
        "pair": row.pair,
        "method": row.method,
        "dtype": row.dtype,
        "attention_dropout": 0.0,
    }


def timed(step: Callable[[], None], device: torch.device) -> float:
    import time

    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak(row: Row, variant: str, device: torch.device) -> int | None:
    """Bytes of a step at its peak, models and optimizer included; of a process of its own."""
    found: int | None = harness.in_a_process(
        _peak_of_this_process, row, variant, device.type, torch.get_num_threads()
    )
    return found


def _peak_of_this_process(row: Row, variant: str, kind: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    device = torch.device(kind)

    def stepper(of: Row) -> Stepper:
        pair = make_pair(of.pair, of.tokens)
        pair.teacher.to(device)
        return Stepper(pair, of, variant, make_batch(pair, of), device)

    with losses_of(variant):
        stepper(Row("tiny", row.method, 2, 8)).step()  # a tiny step loads the code
        gc.collect()
        before = harness.status("VmRSS")
        whole = stepper(row)
        for _ in range(2):
            whole.step()
        if kind == "cuda":
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            whole.step()
            return int(torch.cuda.max_memory_allocated())
        peak = harness.peak_of_process(whole.step)
        return peak and peak[1] - before


def needed(row: Row) -> tuple[int, int]:
    """Bytes, roughly, of all variants' trainers and a step of kdfast; and what one of plain losses
    takes more."""
    layers, width, heads, teacher, student, pairs = {
        "bert": (6, 768, 12, 110e6, 67e6, 6),
        "minilm": (3, 384, 12, 23e6, 17e6, 3),
        "quickstart": (2, 384, 12, 23e6, 16e6, 2),
        "tiny": (2, 32, 2, 1e5, 1e5, 2),
    }[row.pair]
    tokens = row.batch * (row.tokens or 64)
    trainers = 16 * student * (len(VARIANTS) - len(row.without))
    maps = 0 if row.method == "universal" else 4 * pairs * tokens * (row.tokens or 64) * heads
    size = 2 if row.dtype == "bfloat16" else 4
    return int(4 * teacher + trainers + size * tokens * width * layers * 30), int(size * maps)


def rows_of(which: str, only: str = "") -> list[Row]:
    """Raises: InputError where no row has `only` in its name."""
    rows = [row for row in ROWS[which] if only in row.name]
    if not rows:
        raise InputError(
            f"no row of the set {which!r} of step has {only!r} in its name: "
            f"{', '.join(row.name for row in ROWS[which])}"
        )
    return rows


def run(
    device: torch.device,
    *,
    which: str | None = None,
    only: str = "",
    seconds: float | None = None,
    write: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Measure the rows of a set (by default that of the device); `write` sees each state."""
    which = which or device.type
    rows = rows_of(which, only)
    results = harness.begun(which, device, suite="step")
    quick = which == "quick"
    if seconds is None:
        seconds = 0.5 if quick else 90.0 if device.type == "cpu" else 5.0
    rounds = (3, 5) if quick else (5, 15) if device.type == "cpu" else (10, 50)
    with harness.progress(len(rows)) as (say, advance):
        for row in rows:

            def say_of_row(text: str, label: str = f"step {row.name}") -> None:
                say(f"{label}: {text}")

            results["rows"].append(
                measure(row, device, seconds=seconds, rounds=rounds, say=say_of_row)
            )
            write(results)
            advance()
    results["complete"] = True
    write(results)
    return results


# Tables


def markdown(results: dict[str, Any]) -> str:
    from kdfast.benchmarks.report import _table

    header = [
        "row", "soft labels, ms", "kdfast, ms", "of soft labels", "of eager", "of compile",
        "soft labels of fine-tuning", "losses", "tokens / s", "memory, MB", "of soft labels'",
        "of eager's",
    ]  # fmt: skip
    body = []
    for row in results["rows"]:
        if row["skipped"]:
            body.append([row["name"], row["skipped"], *[""] * (len(header) - 2)])
        for how in ("", CACHED, GRAPHS):
            own, base = f"kdfast{how}", f"soft labels{how}"
            if not row["variants"].get(own, {}).get("seconds"):
                continue
            body.append(
                [
                    f"{row['name']}{how}, attention dropout 0",
                    *(_milliseconds(row, name) for name in (base, own)),
                    _cost(row, own, base),
                    *(_cost(row, own, f"{name}{how}") for name in ("eager", "compile")),
                    "" if how else _cost(row, base, "fine-tuning"),
                    f"{100 * share(row, own, 'losses'):.1f} %",
                    f"{row['tokens'] / statistics.median(row['variants'][own]['seconds']):,.0f}",
                    _megabytes(row, own),
                    _memory(row, own, base),
                    "" if how else _memory(row, own, "eager"),
                ]
            )
    lines = [_table(header, body), ""]
    lines += [
        "Ratios of the time of a step, medians over rounds with the middle half's ends: below 1 is "
        'faster. "losses": their share of the step, forward and backward. bfloat16 is autocast on '
        "a CPU and the models' own dtype on a GPU. cached: both steps read the teacher from files "
        "that are in memory, those of one batch; graphs: both replay it. Memory is the peak of a "
        "step, models and optimizer included.",
        "",
        *[f"**Wrong**: {row['name']}: {text}" for row in results["rows"] for text in row["wrong"]],
        "Each variant, and the share of each part in its step, %:",
        "",
        _variants(results),
    ]
    return "\n".join(lines)


def cost(row: dict[str, Any], variant: str, baseline: str) -> tuple[float, float, float] | None:
    """Time of a variant over that of another in the same round: median, middle half's ends."""
    return harness.ratios(row, baseline, variant)


def share(row: dict[str, Any], variant: str, part: str) -> float:
    """Of a part in the step of a variant."""
    parts = {name: statistics.median(s) for name, s in row["variants"][variant]["parts"].items()}
    return parts[part] / sum(parts.values())


def _milliseconds(row: dict[str, Any], variant: str) -> str:
    seconds = row["variants"].get(variant, {}).get("seconds")
    return f"{1e3 * statistics.median(seconds):.0f}" if seconds else ""


def _cost(row: dict[str, Any], variant: str, baseline: str) -> str:
    found = cost(row, variant, baseline)
    if found is None:
        return (row["variants"].get(baseline) or {}).get("skipped") or ""
    return f"{found[0]:.3f} ({found[1]:.3f}-{found[2]:.3f})"


def _megabytes(row: dict[str, Any], variant: str) -> str:
    memory = row["variants"][variant]["memory"]
    return f"{memory / 1e6:,.0f}" if memory else ""


def _memory(row: dict[str, Any], variant: str, baseline: str) -> str:
    own, other = (row["variants"].get(v, {}).get("memory") for v in (variant, baseline))
    return f"{own / other:.2f}" if own and other else ""


def _variants(results: dict[str, Any]) -> str:
    from kdfast.benchmarks.report import _table
    from kdfast.distill.profile import PARTS

    body = []
    for row in results["rows"]:
        for name, variant in row["variants"].items():
            if variant["parts"] and variant["seconds"]:
                body.append(
                    [
                        row["name"],
                        name,
                        _milliseconds(row, name),
                        f"{row['tokens'] / statistics.median(variant['seconds']):,.0f}",
                        _megabytes(row, name),
                        *(f"{100 * share(row, name, part):.1f}" for part in PARTS),
                    ]
                )
    return _table(["row", "variant", "ms", "tokens / s", "memory, MB", *PARTS], body)


def plot(folder: Path, results: dict[str, Any]) -> list[Path]:
    """step_parts.png: the parts of a step of each variant, as bars."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed, and none may be there
    import matplotlib.pyplot as plt

    from kdfast.distill.profile import PARTS

    rows = [row for row in results["rows"] if any(v["parts"] for v in row["variants"].values())]
    if not rows:
        return []
    figure, axes = plt.subplots(
        len(rows), 1, figsize=(7.5, 0.6 + 1.9 * len(rows)), squeeze=False, layout="constrained"
    )
    for axis, row in zip(axes[:, 0], rows, strict=True):
        named = {name: v["parts"] for name, v in row["variants"].items() if v["parts"]}
        left = [0.0] * len(named)
        for k, part in enumerate(PARTS):
            times = [1e3 * statistics.median(parts[part]) for parts in named.values()]
            axis.barh(list(named), times, left=left, color=f"C{k}", label=part)
            left = [a + b for a, b in zip(left, times, strict=True)]
        axis.invert_yaxis()
        axis.set_title(row["name"], fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("ms", fontsize=8)
    axes[0, 0].legend(fontsize=7, ncols=len(PARTS), loc="lower right")
    partial = folder / "step_parts.png.partial"
    figure.savefig(partial, dpi=130, format="png")
    plt.close(figure)
    os.replace(partial, folder / "step_parts.png")
    return [folder / "step_parts.png"]
