"""torch's names in canonical form: which operation a function, a method or a module is."""

from __future__ import annotations

# Operation of each torch.nn class that is a plain function of its input (and weights).
MODULE_OPS = {
    "Linear": "linear", "LazyLinear": "linear", "NonDynamicallyQuantizableLinear": "linear",
    "Conv1d": "conv1d", "Conv2d": "conv2d", "Conv3d": "conv3d",
    "Embedding": "embedding", "Dropout": "dropout", "Dropout1d": "dropout", "Dropout2d": "dropout",
    "Dropout3d": "dropout", "AlphaDropout": "dropout", "FeatureAlphaDropout": "dropout",
    "LayerNorm": "layer_norm", "RMSNorm": "rms_norm", "BatchNorm1d": "batch_norm", "BatchNorm2d": "batch_norm",
    "SyncBatchNorm": "batch_norm", "GroupNorm": "group_norm", "InstanceNorm1d": "instance_norm",
    "InstanceNorm2d": "instance_norm", "LocalResponseNorm": "local_response_norm",
    "ReLU": "relu", "ReLU6": "relu6", "GELU": "gelu", "SiLU": "silu", "ELU": "elu", "SELU": "selu", "CELU": "celu",
    "LeakyReLU": "leaky_relu", "PReLU": "prelu", "Mish": "mish", "Hardswish": "hardswish", "Sigmoid": "sigmoid",
    "LogSigmoid": "logsigmoid", "Tanh": "tanh", "Softplus": "softplus", "Softsign": "softsign", "GLU": "glu",
    "Softmax": "softmax", "LogSoftmax": "log_softmax", "Softmin": "softmin", "Softmax2d": "softmax2d",
    "Flatten": "flatten", "Unflatten": "unflatten", "Bilinear": "bilinear",
    "MultiheadAttention": "mha", "TransformerEncoderLayer": "torch_encoder_layer",
    "TransformerDecoderLayer": "torch_decoder_layer", "TransformerEncoder": "torch_encoder",
    "TransformerDecoder": "torch_decoder", "Transformer": "torch_transformer", "GatedSiLU": "swiglu",
    "Gated": "swiglu",
    "RotaryEmbedding": "rotary", "ALiBi": "alibi", "PrismAdapter": "linear",
    "SubNormLinear": "linear",
}  # fmt: skip

# Parameter names of the torch.nn constructors that rules look into, in torch's positional order.
SIGNATURES = {
    "Linear": ("in_features", "out_features", "bias", "device", "dtype"),
    "SubNormLinear": ("in_features", "out_features", "bias", "device", "dtype"),
    "FusedLinear": ("in_features", "out_features", "bias", "device", "dtype"),
    "PrismAdapter": ("in_features", "out_features", "bias"),
    "Prismatic": ("expert", "num_experts", "architectures"),
    "Embedding": ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq",
                  "sparse", "_weight", "_freeze", "device", "dtype"),
    "Conv1d": ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias",
               "padding_mode", "device", "dtype"),
    "Conv2d": ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias",
               "padding_mode", "device", "dtype"),
    "LayerNorm": ("normalized_shape", "eps", "elementwise_affine", "bias", "device", "dtype"),
    "RMSNorm": ("normalized_shape", "eps", "elementwise_affine", "device", "dtype"),
    "BatchNorm1d": ("num_features", "eps", "momentum", "affine", "track_running_stats", "device", "dtype"),
    "GroupNorm": ("num_groups", "num_channels", "eps", "affine", "device", "dtype"),
    "Dropout": ("p", "inplace"), "ReLU": ("inplace",), "GELU": ("approximate",), "SiLU": ("inplace",),
    "LeakyReLU": ("negative_slope", "inplace"), "ELU": ("alpha", "inplace"), "GLU": ("dim",),
    "Softmax": ("dim",), "LogSoftmax": ("dim",),
    "MultiheadAttention": ("embed_dim", "num_heads", "dropout", "bias", "add_bias_kv", "add_zero_attn", "kdim",
                           "vdim", "batch_first", "device", "dtype"),
    "TransformerEncoderLayer": ("d_model", "nhead", "dim_feedforward", "dropout", "activation", "layer_norm_eps",
                                "batch_first", "norm_first", "bias", "device", "dtype"),
    "TransformerDecoderLayer": ("d_model", "nhead", "dim_feedforward", "dropout", "activation", "layer_norm_eps",
                                "batch_first", "norm_first", "bias", "device", "dtype"),
    "TransformerEncoder": ("encoder_layer", "num_layers", "norm", "enable_nested_tensor", "mask_check"),
    "TransformerDecoder": ("decoder_layer", "num_layers", "norm"),
    "Transformer": ("d_model", "nhead", "num_encoder_layers", "num_decoder_layers", "dim_feedforward", "dropout",
                    "activation", "custom_encoder", "custom_decoder", "layer_norm_eps", "batch_first", "norm_first",
                    "bias", "device", "dtype"),
}  # fmt: skip

# Parameter names of the calls of torch's modules and of functions, receiver or input first.
CALLS = {
    "mha": ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights",
            "is_causal"),
    "torch_encoder_layer": ("src", "src_mask", "src_key_padding_mask", "is_causal"),
    "torch_decoder_layer": ("tgt", "memory", "tgt_mask", "memory_mask", "tgt_key_padding_mask",
                            "memory_key_padding_mask", "tgt_is_causal", "memory_is_causal"),
    "torch_encoder": ("src", "mask", "src_key_padding_mask", "is_causal"),
    "torch_decoder": ("tgt", "memory", "tgt_mask", "memory_mask", "tgt_key_padding_mask",
                      "memory_key_padding_mask", "tgt_is_causal", "memory_is_causal"),
    "torch_transformer": ("src", "tgt", "src_mask", "tgt_mask", "memory_mask", "src_key_padding_mask",
                          "tgt_key_padding_mask", "memory_key_padding_mask"),
    "softmax": ("input", "dim"), "log_softmax": ("input", "dim"), "masked_fill": ("input", "mask", "value"),
    "dropout": ("input", "p", "training", "inplace"), "transpose": ("input", "dim0", "dim1"),
    "where": ("condition", "input", "other"), "matmul": ("input", "other"), "cat": ("tensors", "dim"),
    "stack": ("tensors", "dim"), "chunk": ("input", "chunks", "dim"), "split": ("input", "split_size", "dim"),
    "unsqueeze": ("input", "dim"), "squeeze": ("input", "dim"), "flatten": ("input", "start_dim", "end_dim"),
    "unflatten": ("input", "dim", "sizes"), "unbind": ("input", "dim"), "tril": ("input", "diagonal"),
    "triu": ("input", "diagonal"), "mean": ("input", "dim", "keepdim"), "sum": ("input", "dim", "keepdim"),
    "var": ("input", "dim", "unbiased", "keepdim"), "std": ("input", "dim", "unbiased", "keepdim"),
    "pow": ("input", "exponent"), "embedding": ("input", "weight"), "linear": ("input", "weight", "bias"),
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale",
                                     "enable_gqa"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"), "rearrange": ("input", "pattern"),
    "add": ("input", "other", "alpha"), "sub": ("input", "other", "alpha"), "mul": ("input", "other"),
    "div": ("input", "other", "rounding_mode"), "baddbmm": ("input", "batch1", "batch2", "beta", "alpha"),
    "addmm": ("input", "mat1", "mat2", "beta", "alpha"), "narrow": ("input", "dim", "start", "length"),
    "index_select": ("input", "dim", "index"), "gather": ("input", "dim", "index"), "select": ("input", "dim", "index"),
    "relu": ("input", "inplace"), "gelu": ("input", "approximate"),
    "leaky_relu": ("input", "negative_slope", "inplace"),
}  # fmt: skip

SAME = {
    "bmm": "matmul", "mm": "matmul", "__matmul__": "matmul", "mv": "matmul", "swapaxes": "transpose",
    "swapdims": "transpose", "divide": "div", "true_divide": "div", "multiply": "mul", "subtract": "sub",
    "concat": "cat", "concatenate": "cat", "tile": "repeat", "negative": "neg", "bitwise_not": "invert",
    "logical_not": "logical_not", "truediv": "div", "feature_dropout": "dropout", "dropout1d": "dropout",
    "alpha_dropout": "dropout", "size": "shape", "swish": "silu", "moveaxis": "movedim", "power": "pow",
    "_softmax": "softmax",
}  # fmt: skip

FUNCTION_PACKAGES = ("torch.nn.functional.", "torch.special.", "torch.linalg.", "torch.Tensor.", "torch.", "numpy.",
                     "math.", "einops.", "operator.", "modernizer.components.")  # fmt: skip

# Our own functions that do what one of torch's does.
OWN_FUNCTIONS = {
    "modernizer.components.masked_attention": "scaled_dot_product_attention",
    "modernizer.components.masked_attention.masked_attention": "scaled_dot_product_attention",
    "modernizer.components.gated": "swiglu",
}

RANDOM_WEIGHT_FILLERS = "torch.nn.init."


def operation(name: str) -> str:
    """The canonical operation of a function or method name; the `_` of an in-place form goes."""
    plain = name.rstrip("_") if not name.startswith("__") else name
    return SAME.get(plain, plain)


def function_operation(dotted: str) -> str | None:
    """The canonical operation of a function's dotted name, None where it is no function of torch, numpy or math."""
    if dotted in OWN_FUNCTIONS:
        return OWN_FUNCTIONS[dotted]
    for package in FUNCTION_PACKAGES:
        if dotted.startswith(package):
            rest = dotted.removeprefix(package)
            return operation(rest) if "." not in rest else None
    return None
