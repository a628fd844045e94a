"""Laws of every stored line: splitting into roles and joining again is the identity, on plain numbers and on codes, for every size."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SIZES, make_parts

from moeglot.axes import parse_axes
from moeglot.encoded import Encoded
from moeglot.encodings.mxfp4 import MXFP4
from moeglot.encodings.plain import Plain
from moeglot.formats import PLAIN
from moeglot.layout import ROLES, Stored

LINES = [(form, line) for form in PLAIN for line in form.stored]


@given(st.sampled_from(LINES), SIZES, st.integers(0, 2**31))
def test_join_inverts_split(chosen, sizes, seed):
    _, line = chosen
    encoding = Plain("BF16") if isinstance(line.encoding, Plain) else line.encoding
    assert line.movable(encoding, sizes)
    stored = make_parts(encoding, line.expert_shape(sizes), seed)
    roles = line.split(stored)
    again = line.join(roles.__getitem__)
    assert set(roles) == set(line.roles)
    for role, encoded in roles.items():
        assert encoded.shape == tuple(sizes[letter] for letter in ROLES[role].split())
    for name, part in stored.parts.items():
        assert torch.equal(part, again.parts[name])


@given(st.sampled_from(LINES), SIZES, st.integers(0, 2**31))
def test_axes_say_where_each_number_lies(chosen, sizes, seed):
    """Element by element, by counting through the axes string in nested loops: no library, no reshape."""
    _, line = chosen
    stored = torch.arange(torch.Size(line.expert_shape(sizes)).numel(), dtype=torch.float64).view(line.expert_shape(sizes))
    roles = line.split(Encoded(Plain("F64"), {"value": stored}, tuple(stored.shape)))
    counts = {**sizes, "p": len(line.roles)}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        at = {letter: int(torch.randint(counts[letter], (), generator=generator)) for letter in "hijp"}
        place = []
        for group in [[letter for letter in group if letter != "e"] for group in parse_axes(line.axes) if group != ("e",)]:
            index, (last, rows) = 0, (group[0], int(group[-1]) if group[-1].isdecimal() else 1)
            for letter in group[:-1] if rows > 1 else group:
                long = rows if letter == last and rows > 1 else 1
                index = index * (counts[letter] // long) + at[letter] // long
            place.append(index * rows + at[last] % rows)
        role = line.roles[at["p"] if len(line.roles) > 1 else 0]
        canonical = roles[role].parts["value"][tuple(at[letter] for letter in ROLES[role].split())]
        assert canonical == stored[tuple(place)]


@given(st.sampled_from([line for _, line in LINES if line.is_matrix]), SIZES, st.integers(0, 2**31))
def test_what_a_stored_matrix_gives_is_what_its_roles_give(line, sizes, seed):
    stored = make_parts(Plain("F32"), line.expert_shape(sizes), seed)
    roles = {role: encoded.parts["value"].double() for role, encoded in line.split(stored).items()}
    tokens = torch.randn(3, next(iter(roles.values())).shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    given = tokens @ line.in_out(stored.parts["value"].double().unsqueeze(0))[0]
    for role, found in line.apart(given).items():
        torch.testing.assert_close(found, tokens @ roles[role].mT)
    assert torch.equal(line.together(line.apart(given)), given)


@given(st.sampled_from([(f, line) for f, line in LINES if isinstance(line.encoding, MXFP4)]), SIZES, st.integers(0, 2**31))
def test_codes_move_as_their_values_do(chosen, sizes, seed):
    """Split then decode is decode then split: no block is torn."""
    _, line = chosen
    stored = make_parts(line.encoding, line.expert_shape(sizes), seed)
    values = Encoded(Plain("F32"), {"value": stored.decode(torch.float32)}, stored.shape)
    for role, encoded in line.split(stored).items():
        assert torch.equal(encoded.decode(torch.float32), line.split(values)[role].parts["value"])


@given(st.sampled_from(LINES), SIZES)
def test_misreadings_have_the_same_bytes_and_another_meaning(chosen, sizes):
    _, line = chosen
    for other in line.misreadings(sizes):
        assert other.expert_shape(sizes) == line.expert_shape(sizes)
        assert (other.axes, other.roles) != (line.axes, line.roles)


def test_a_square_down_has_the_turned_misreading():
    line = Stored("{layer}.down", ("down",), "e h i")
    assert [other.axes for other in line.misreadings({"e": 2, "h": 4, "i": 4})] == ["e i h"]
    assert not list(line.misreadings({"e": 2, "h": 4, "i": 8}))


@pytest.mark.parametrize(
    ("axes", "roles", "key"),
    [
        ("e h i", ("gate", "up"), "{layer}"),  # two roles and no p
        ("e (p i) h", ("down",), "{layer}"),  # p and one role
        ("e e h i", ("down",), "{layer}"),  # an axis twice
        ("e h i", ("down",), "{layer}.{expert}"),  # e in the key and in the axes
        ("h i", ("down",), "{layer}"),  # e nowhere
        ("h e i", ("down",), "{layer}"),  # an expert is not one run of bytes
        ("e h", ("down",), "{layer}"),  # an axis missing
        ("e h i", ("down",), "down"),  # no layer
        ("e (p i)", ("gate", "up_bias"), "{layer}"),  # roles of different axes
    ],
)
def test_a_wrong_spec_fails_where_it_is_written(axes, roles, key):
    with pytest.raises((ValueError, KeyError)):
        Stored(key, roles, axes)


def test_every_pair_of_arrangements_differs():
    """The notation tells apart all eight ways to store a fused square gate and up."""
    sizes = {"e": 1, "h": 8, "i": 4}
    line = Stored("{layer}", ("gate", "up"), "e (p i) h")
    stored = torch.arange(64.0).view(8, 8)
    read = {}
    for other in [line, *line.misreadings(sizes)]:
        roles = other.split(Encoded(Plain("F32"), {"value": stored}, (8, 8)))
        read[other.axes, other.roles] = (roles["gate"].parts["value"], roles["up"].parts["value"])
    assert len(read) == 8
    for (a, x), (b, y) in product(read.items(), read.items()):
        assert a == b or not (torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]))
