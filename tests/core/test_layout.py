from itertools import permutations

import pytest

from topi_core.layout import Layout

ORDERS = list(permutations(("text", "target", "references")))


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_slices_follow_the_order(order):
    """A sequence written out by hand, token by token."""
    layout = Layout(3, (2, 4), ((1, 5), (2, 2)), order)
    parts = {"text": "xxx", "target": "tttttttt", "references": "aaaaabbbb"}
    sequence = "".join(parts[part] for part in order)
    assert layout.tokens == len(sequence) and layout.reference_tokens == 9
    assert sequence[layout.text] == "xxx" and sequence[layout.target] == "t" * 8
    assert sequence[layout.reference] == "aaaaabbbb"
    assert [sequence[place] for place in layout.references] == ["aaaaa", "bbbb"]
    images, without = layout.without_text, sequence.replace("x", "")
    assert images.tokens == len(without) and without[images.target] == "t" * 8
    assert [without[place] for place in images.references] == ["aaaaa", "bbbb"]


def test_text_then_target_then_references_unless_told():
    layout = Layout(3, (2, 4), ((1, 5),))
    assert (layout.text, layout.target, layout.reference) == (slice(0, 3), slice(3, 11), slice(11, 16))
    assert Layout(3, (2, 4), ()).reference == slice(11, 11)
