import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modernizer.components import ALiBi, RotaryEmbedding, Transformer, swiglu

SIZES: dict[str, Any] = {"d_model": 8, "nhead": 2, "num_encoder_layers": 2, "num_decoder_layers": 3, "dropout": 0.0}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(kind: type[nn.Transformer], **options: Any) -> nn.Transformer:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="enable_nested_tensor")  # torch's, for some options
        return kind(dim_feedforward=16, **SIZES, **options)


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"norm_first": True, "activation": "gelu"}])
def test_is_torchs_when_nothing_is_asked_for(options: dict[str, Any]) -> None:
    theirs, ours = build(nn.Transformer, **options), build(Transformer, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    source, target = rand(4, 4, 8), rand(4, 4, 8, seed=1)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    assert torch.equal(ours(source, target, tgt_mask=mask), theirs(source, target, tgt_mask=mask))


def test_positions_leave_parameters_and_seed_alone() -> None:
    theirs, ours = build(nn.Transformer), build(Transformer, rotary=True, alibi=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_every_layer_gets_the_parts() -> None:
    ours = build(Transformer, rotary=True, alibi=True, gated=True, bias=False, norm_first=True)
    kinds = [type(m) for m in ours.modules()]
    assert kinds.count(RotaryEmbedding) == kinds.count(ALiBi) == 5
    assert all(layer.activation is swiglu for layer in [*ours.encoder.layers, *ours.decoder.layers])
    assert isinstance(ours.encoder.norm, nn.LayerNorm) and isinstance(ours.decoder.norm, nn.LayerNorm)
    assert ours.encoder.norm.bias is None


def test_gated_with_the_old_width() -> None:
    ours = build(Transformer, gated=True, keep_hidden=True)
    assert ours.encoder.layers[0].linear1.out_features == ours.decoder.layers[0].linear1.out_features == 32


@pytest.mark.parametrize("asked", [{"rotary": True}, {"alibi": True}, {"gated": True}])
def test_changes_the_function_and_keeps_causality(asked: dict[str, bool]) -> None:
    theirs, ours = build(nn.Transformer), build(Transformer, **asked)
    source, target = rand(5, 2, 8), rand(4, 2, 8, seed=1)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    out = ours(source, target, tgt_mask=mask)
    assert not torch.allclose(out, theirs(source, target, tgt_mask=mask))
    changed = torch.cat((target[:3], rand(1, 2, 8, seed=2)))
    torch.testing.assert_close(ours(source, changed, tgt_mask=mask)[:3], out[:3])


def test_custom_stacks_are_kept() -> None:
    encoder, decoder = nn.Identity(), nn.Identity()
    ours = Transformer(custom_encoder=encoder, custom_decoder=decoder, rotary=True)
    assert ours.encoder is encoder and ours.decoder is decoder


def test_constructor_is_torchs() -> None:
    ours, theirs = (inspect.signature(c.__init__).parameters for c in (Transformer, nn.Transformer))
    shared = {name: (p.kind, p.default) for name, p in theirs.items()}
    assert {n: (p.kind, p.default) for n, p in ours.items() if n in shared} == shared
    assert list(ours)[: len(shared)] == list(shared)
