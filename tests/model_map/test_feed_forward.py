"""Feed-forwards are known by what they compute and by the stream they stand on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import swiglu_forms as forms
from hypothesis import given
from hypothesis import strategies as st

from modernizer.model_map import ModelMap, read_model
from modernizer.model_map.activation import KNOWN
from modernizer.model_map.activation import name_of as name_of_function
from modernizer.model_map.feed_forward import FeedForward
from modernizer.project import Project


def read(folder: Path, text: str) -> ModelMap:
    path = folder / "model.py"
    path.write_text(text)
    return read_model(Project([path]))


def only(folder: Path, call: str, body: str = "pass") -> FeedForward:
    """The feed-forward of the first block of a model whose activation is `call`."""
    return next(iter(read(folder, forms.program(forms.GELU + forms.two_linears(call, body))).feed_forwards))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("F.relu(self.fc1(x))", "relu"),
        ("self.fc1(x).clamp_min(0)", "relu"),
        ("torch.maximum(self.fc1(x), torch.tensor(0.0))", "relu"),
        ("gelu(self.fc1(x))", "gelu"),
        ("GELU()(self.fc1(x))", "gelu (tanh)"),
        ("QuickGELU()(self.fc1(x))", "quick gelu"),
        ("F.leaky_relu(self.fc1(x), 0.3)", "leaky relu"),
        ("F.elu(self.fc1(x))", "elu"),
        ("F.silu(self.fc1(x))", "silu"),
        ("F.relu(self.fc1(x)) ** 2", "squared relu"),
        ("F.relu(self.fc1(x)) * 3", "other"),
    ],
)
def test_activation_is_named_by_what_it_computes(call: str, name: str, tmp_path: Path) -> None:
    assert only(tmp_path, call).activations == {name}


@pytest.mark.parametrize(
    "call", ["self.fc1(x)", "self.fc1(x) * 2", "F.leaky_relu(self.fc1(x), 1.0)", "F.softmax(self.fc1(x), -1)"]
)
def test_no_activation_no_feed_forward(call: str, tmp_path: Path) -> None:
    assert not list(read(tmp_path, forms.program(forms.two_linears(call))).feed_forwards)


def test_where_the_code_chooses_all_names_are_given(tmp_path: Path) -> None:
    made = only(tmp_path, "F.relu(self.fc1(x)) if x.mean() > 0 else F.gelu(self.fc1(x))")
    assert made.activations <= {"relu", "gelu"}


def test_only_what_stands_on_the_stream_counts(tmp_path: Path) -> None:
    text = forms.FORMS["relu function"].replace(
        "self.head = nn.Linear(d, vocab)", "self.head = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, vocab))"
    )
    found = list(read(tmp_path, text).feed_forwards)
    assert [made.counts for made in found] == [True, True, False]


@pytest.mark.parametrize("fixture", ["bert_encoder", "char_gpt", "latent_drift_trajectory", "translator"])
def test_fixtures_have_plain_feed_forwards(fixture: str) -> None:
    folder = Path(__file__).parents[2] / "fixtures" / fixture
    found = [made for made in read_model(Project.open([folder])).feed_forwards if made.counts]
    assert found and all(made.is_legacy for made in found)


def test_role_with_evidence(tmp_path: Path) -> None:
    (role,) = (r for r in read(tmp_path, forms.FORMS["relu function"]).roles if "feed-forward" in r.kind)
    assert (role.kind, role.owner) == ("feed-forward", "FeedForward")
    assert [e.sentence for e in role.evidence] == [
        "a projection, then relu",
        "the projection back, whose result is added to what it read",
    ]


@given(st.floats(-6, 6))
def test_known_functions_are_what_they_are_called(x: float) -> None:
    assert KNOWN["relu"](x) == max(x, 0)
    assert KNOWN["gelu"](x) == pytest.approx(x * (1 + math.erf(x / math.sqrt(2))) / 2)
    assert KNOWN["gelu (tanh)"](x) == pytest.approx(KNOWN["gelu"](x), abs=1e-3)
    assert KNOWN["silu"](x) == pytest.approx(x / (1 + math.exp(-x)))


def test_product_of_two_projections_is_gated(tmp_path: Path) -> None:
    gated = next(
        iter(read(tmp_path, forms.program(forms.two_linears("F.relu(self.fc1(x)) * self.fc1(x)"))).feed_forwards)
    )
    assert gated.gated
    plain = only(tmp_path, "F.relu(self.fc1(x))")
    value, leaf = plain.activated, plain.first.value
    assert name_of_function(value, leaf, {}) == "relu"
