"""What people call things: the usual names, short ones, and names that promise something else."""

from __future__ import annotations

import re
from collections.abc import Mapping

USUAL_CLASSES = {"OwnNorm": "LayerNorm", "TransformerModel": "Transformer"}
TERSE_CLASSES = {
    "OwnNorm": "LN",
    "MultiHeadAttention": "MHA",
    "SelfAttention": "SA",
    "CrossAttention": "XA",
    "FeedForward": "FFN",
    "Block": "Blk",
    "EncoderBlock": "EncBlk",
    "DecoderBlock": "DecBlk",
    "Encoder": "Enc",
    "Decoder": "Dec",
    "PositionalEncoding": "PE",
    "Embeddings": "Emb",
    "SublayerConnection": "Res",
    "ResidualWrapper": "Wrap",
    "AddNorm": "AN",
    "TransformerModel": "Net",
}
TERSE_ATTRIBUTES = {
    "tok_emb": "te",
    "pos_emb": "pe_",
    "pos_encoder": "p",
    "attn": "sa",
    "cross_attn": "ca",
    "norm1": "n1",
    "norm2": "n2",
    "norm3": "n3",
    "final_norm": "nf",
    "w_query": "wq",
    "w_key": "wk",
    "w_value": "wv",
    "n_heads": "nh",
    "head_dim": "hd",
    "lm_head": "o",
    "layers": "ls",
    "w_1": "a",
    "w_2": "b",
}
MISLEADING_CLASSES = {
    "OwnNorm": "BatchNorm",
    "MultiHeadAttention": "FeedForwardAttention",
    "FeedForward": "GatedLinearUnit",
    "Embeddings": "PositionalEncoding",
    "PositionalEncoding": "RelativePositions",
    "SublayerConnection": "FeedForwardConnection",
    "ResidualWrapper": "PositionWise",
    "AddNorm": "PreNorm",
    "Encoder": "EncoderLayer",
    "Decoder": "DecoderLayer",
    "TransformerModel": "LSTMModel",
}
MISLEADING_ATTRIBUTES = {
    "norm1": "post_norm",
    "norm2": "pre_norm",
    "final_norm": "input_norm",
    "w_query": "key_layer",
    "w_key": "query_layer",
    "pos_emb": "token_type",
    "layers": "pos_embedding_layers",
    "attn": "linear",
    "scores": "pos",
}


def classes(naming: str, order: str) -> Mapping[str, str]:
    """The new names of classes. Misleading blocks claim the other order of norms."""
    if naming == "misleading":
        claimed = "PostNorm" if order == "pre" else "PreNorm"
        blocks = {name: f"{claimed}{name}" for name in ("Block", "EncoderBlock", "DecoderBlock")}
        return MISLEADING_CLASSES | blocks
    return TERSE_CLASSES if naming == "terse" else USUAL_CLASSES


def attributes(naming: str) -> Mapping[str, str]:
    return {"usual": {}, "terse": TERSE_ATTRIBUTES, "misleading": MISLEADING_ATTRIBUTES}[naming]


def renamed(text: str, naming: str, order: str) -> str:
    """Source text with its classes and attributes called as a scheme of names says."""
    names = classes(naming, order)
    text = re.sub(r"(?<![\w.])([A-Z]\w*)\b", lambda m: names.get(m[1], m[1]), text)
    attrs = attributes(naming)
    return re.sub(r"(?<=self\.)([a-z_]\w*)\b", lambda m: attrs.get(m[1], m[1]), text)
