"""What the students that are no transformers share: word embeddings, pooling, heads.

    h_0 = project(LayerNorm(word embedding)),   h_i = layer_i(h_{i−1}),   logits = W pool(h_L) + b

The states of padded positions are 0 at every level, and no real position reads one: what comes out
for a sentence does not depend on how much it is padded, nor on which side.

pool is "mean" (default) or "max" over the real positions. There is no [CLS] state to read: that of
a recurrent layer has read the sentence in one direction only, that of a convolution only its first
words. The mean gives every position gradient; Conneau et al. (2017) found the maximum better for
bidirectional LSTMs trained on large data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from kdfast.errors import InputError, nearest

POOLINGS = ("mean", "max")


class StudentConfig(PreTrainedConfig):
    """Configuration of a student without attention.

    Args:
        vocab_size, pad_token_id: those of the tokenizer.
        num_hidden_layers: L; `hidden_states` are L + 1.
        hidden_size: width of every hidden state.
        embedding_size: width of the word embeddings (default: hidden_size); another one is
            projected to hidden_size.
        hidden_dropout_prob: dropout on the input of every layer and of the head.
        pooling: "mean" or "max" over the real positions.
        initializer_range: standard deviation of the word embeddings (0.1: Gehring et al. 2017).

    Raises InputError for a size below 1, a dropout outside [0, 1), an unknown pooling.
    """

    num_attention_heads = 0

    def __init__(
        self,
        vocab_size: int = 30522,
        num_hidden_layers: int = 2,
        hidden_size: int = 512,
        embedding_size: int | None = None,
        hidden_dropout_prob: float = 0.1,
        pooling: str = "mean",
        initializer_range: float = 0.1,
        layer_norm_eps: float = 1e-12,
        pad_token_id: int | None = 0,
        **kwargs: Any,
    ) -> None:
        embedding_size = hidden_size if embedding_size is None else embedding_size
        sizes = {
            "vocab_size": vocab_size,
            "num_hidden_layers": num_hidden_layers,
            "hidden_size": hidden_size,
            "embedding_size": embedding_size,
        }
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InputError(f"{name} must be a whole number of at least 1, was {size!r}")
        if not isinstance(hidden_dropout_prob, (int, float)) or not 0 <= hidden_dropout_prob < 1:
            raise InputError(
                f"hidden_dropout_prob must be at least 0 and below 1, was {hidden_dropout_prob!r}"
            )
        if pooling not in POOLINGS:
            raise InputError(
                f"pooling must be one of {', '.join(POOLINGS)}, was {pooling!r}"
                f"{nearest(pooling, POOLINGS)}"
            )
        self.vocab_size = vocab_size
        self.num_hidden_layers = num_hidden_layers
        self.hidden_size = hidden_size
        self.embedding_size = embedding_size
        self.hidden_dropout_prob = hidden_dropout_prob
        self.pooling = pooling
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.pad_token_id = pad_token_id
        super().__init__(**kwargs)


class WordEmbeddings(nn.Module):
    """Word embeddings, normalised so that copied and random ones reach the layers at one scale."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.word_embeddings(input_ids))


class Student(PreTrainedModel):
    """How the parameters of every student start, with or without a head."""

    config: Any
    main_input_name = "input_ids"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)


class StudentModel(Student):
    """Embeddings and layers, without a head; a family gives `layers` and how states pass them."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__(config)
        self.embeddings = WordEmbeddings(config)
        # Beside the embeddings, not in them: a random projection must train where those are frozen.
        self.embeddings_project = (
            nn.Identity()
            if config.embedding_size == config.hidden_size
            else nn.Linear(config.embedding_size, config.hidden_size)
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(
            self.make_layer(config) for _ in range(config.num_hidden_layers)
        )
        self.post_init()

    def make_layer(self, config: Any) -> nn.Module:
        raise NotImplementedError

    def layer_states(
        self, states: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """The states [B, N, D] after each layer, 0 where the mask [B, N] is False."""
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """last_hidden_state [B, N, D] and, when asked for, L + 1 hidden states.

        input_ids [B, N]; attention_mask [B, N], 1 = token (None: nothing is padded).
        token_type_ids are accepted and ignored, because the tokenizer of a BERT teacher makes them:
        in a pair the separator tells the two sentences apart.
        """
        mask = None if attention_mask is None else attention_mask.bool()
        states = self.embeddings_project(self.embeddings(input_ids))
        if mask is not None:
            states = states.masked_fill(~mask[..., None], 0.0)
        hidden_states = (states, *self.layer_states(states, mask))
        if output_hidden_states is None:
            output_hidden_states = getattr(self.config, "output_hidden_states", False)
        output = BaseModelOutput(
            last_hidden_state=hidden_states[-1],
            hidden_states=hidden_states if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output


class StudentWithHead(Student):
    """A student of `body_class` and a linear head on its last states."""

    body_class: type[StudentModel]
    output: Any
    read: Any
    loss: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, self.body_class(config))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """logits and, with labels, their loss; shapes as the class says."""
        body = self.base_model(
            input_ids, attention_mask, token_type_ids, output_hidden_states, output_attentions
        )
        read = self.read(body.last_hidden_state, attention_mask)
        logits = self.classifier(self.dropout(read))
        loss = None if labels is None else self.loss(logits, labels)
        output = self.output(loss=loss, logits=logits, hidden_states=body.hidden_states)
        return output.to_tuple() if return_dict is False else output


class StudentForSequenceClassification(StudentWithHead):
    """One answer a sentence, logits [B, C], from its pooled last states; labels are [B], or [B, C]
    of several at once. One output is a regression."""

    output = SequenceClassifierOutput

    def read(self, states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return pool(states, attention_mask, self.config.pooling)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss_function(labels=labels, pooled_logits=logits, config=self.config)


class StudentForTokenClassification(StudentWithHead):
    """One answer a token, logits [B, N, C], from its last state; labels are [B, N], −100 = none."""

    output = TokenClassifierOutput

    def read(self, states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return states

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss_function(logits=logits, labels=labels, config=self.config)


def pool(
    states: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str = "mean"
) -> torch.Tensor:
    """[B, D]: mean or maximum of states [B, N, D] over real positions; 0 where there are none."""
    if attention_mask is None:
        return states.mean(1) if pooling == "mean" else states.amax(1)
    mask = attention_mask.bool()[..., None]
    if pooling == "mean":
        return states.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    return states.masked_fill(~mask, -torch.inf).amax(1).masked_fill(~mask.any(1), 0.0)


def initialise_embeddings(student: PreTrainedModel, base: PreTrainedModel) -> None:
    """Copies the word embeddings of `base` into `student`, in place.

    Raises InputError unless both tables [vocab_size, width of the embeddings] have one shape.
    """
    tables: Any = [model.get_input_embeddings() for model in (student, base)]
    mine, theirs = (tuple(table.weight.shape) for table in tables)
    if mine != theirs:
        raise InputError(
            f"the word embeddings of {type(student).__name__} are {mine[0]} × {mine[1]}, those of "
            f"{type(base).__name__} {theirs[0]} × {theirs[1]}: they must be alike (embedding_size "
            "of a BiLSTM or gated CNN, the width of most transformers)"
        )
    with torch.no_grad():
        tables[0].weight.copy_(tables[1].weight)
