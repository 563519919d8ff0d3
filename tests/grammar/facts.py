"""What is true of a program by construction, and what each rule therefore has to do with it."""

from __future__ import annotations

from dataclasses import dataclass

from .choices import Choice

APPLY, KEEP, HARD = "apply", "keep", "hard"
RULES = ("rope", "alibi", "prenorm", "swiglu", "sdpa")


@dataclass(frozen=True)
class Facts:
    """`order` is how the blocks norm: pre, post, pseudo, flag. Attentions are counted over all layers and heads."""

    causal: bool
    positions_reach_attention: bool
    order: str
    gated: bool
    self_attentions: int
    cross_attentions: int
    feed_forwards: int
    uses_torch_attention: bool
    block_class: str
    norm: str
    drops_weights: bool

    @classmethod
    def of(cls, choice: Choice, block_class: str) -> Facts:
        layers, heads = 2, 2 if choice.attention == "heads" else 1
        return cls(
            causal=choice.is_causal,
            positions_reach_attention=choice.position != "none",
            order=choice.order,
            gated=choice.feed_forward == "gated",
            self_attentions=layers * heads * (2 if choice.has_cross else 1),
            cross_attentions=layers * heads if choice.has_cross else 0,
            feed_forwards=layers * (2 if choice.has_cross else 1),
            uses_torch_attention=choice.is_torch,
            block_class=block_class,
            norm=choice.norm,
            drops_weights=choice.attention_dropout in ("weights", "both"),
        )


def expected(choice: Choice) -> dict[str, str]:
    """Rule -> `apply` (there is work), `keep` (nothing may change) or `hard` (either done rightly or refused)."""
    positions = KEEP if choice.position == "none" else APPLY
    return {
        "rope": positions,
        "alibi": positions,
        "prenorm": {"pre": KEEP, "post": APPLY, "pseudo": HARD, "flag": HARD}[choice.order],
        "swiglu": KEEP if choice.feed_forward == "gated" else APPLY,
        "sdpa": KEEP if choice.is_torch else HARD if choice.weights != "hidden" else APPLY,
    }
