"""Embeddings and heads that are one tensor under two names."""

from __future__ import annotations

from collections.abc import Sequence

from tbfast.errors import CheckpointError
from tbfast.merging.header import Entry
from tbfast.merging.inputs import Source

_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")

Entries = dict[str, Entry]


def tie(
    models: Sequence[Source], base: Source | None, wish: str
) -> tuple[list[Entries], dict[str, str], bool | None]:
    """What each model has under which name.

    Args:
        models: The models.
        base: The base, whose own head is left alone.
        wish: ``"auto"``; ``"untie"``: a tied model gets a head of its own; ``"drop"``: heads are
            left out, and the result is tied.

    Returns:
        The entries of each model; for names that share their random numbers with another, that
        other; and what tie_word_embeddings is to say, None for what it says already.

    Raises:
        CheckpointError: If some models are tied and others not, and the wish is ``"auto"``.
    """
    entries = [dict(model.entries) for model in models]
    heads = [_HEAD in mine for mine in entries]
    embedding = next(
        (name for name in entries[0] if name.endswith(_EMBEDDINGS) and "decoder" not in name), None
    )
    ties = [bool(model.config.get("tie_word_embeddings")) for model in models]
    if embedding is None or not (any(heads) and (any(ties) or not all(heads))):
        return entries, {}, None
    if wish == "drop":
        for mine in entries:
            mine.pop(_HEAD, None)
        return entries, {}, True
    if wish == "untie":
        for mine in entries:
            if embedding in mine:
                mine.setdefault(_HEAD, mine[embedding])
        return entries, {}, False
    differing = next(
        (
            m
            for m, head, t in zip(models, heads, ties, strict=True)
            if (head, t) != (heads[0], ties[0])
        ),
        None,
    )
    if differing is not None:
        raise CheckpointError.of(
            differing.path,
            f"is {_state(differing)}, but '{models[0].path}' is {_state(models[0])}; use "
            "tied='untie' to give every model a head, or tied='drop' to leave it out",
        )
    return entries, {_HEAD: embedding}, None


def _state(model: Source) -> str:
    tied = "tied" if model.config.get("tie_word_embeddings") else "not tied"
    return f"{tied} and {'has' if _HEAD in model.entries else 'has no'} '{_HEAD}'"
