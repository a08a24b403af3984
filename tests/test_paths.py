"""Names of leaves, and what is said about rules that decide nothing."""

import jax.numpy as jnp
import pytest

from bigjax import paths
from bigjax.errors import UserError

TREE = {
  "blocks": {"attn": {"query": {"kernel": 1, "bias": 2}}, "mlp": {"up": {"kernel": 3}}},
  "head": {"kernel": 4, "bias": 5},
}
NAMES = ["blocks/attn/query/bias", "blocks/attn/query/kernel", "blocks/mlp/up/kernel", "head/bias", "head/kernel"]


def test_a_leaf_is_named_by_its_keys_in_the_order_of_leaves():
  assert paths.names(TREE) == NAMES
  assert paths.names({"layers": [jnp.ones(2), (jnp.ones(1),)]}) == ["layers/0", "layers/1/0"]


def test_a_function_can_see_the_names():
  doubled = paths.map_with_name(lambda name, x, y: x * y if name.endswith("bias") else 0, TREE, TREE)
  assert doubled["head"] == {"kernel": 0, "bias": 25}


def test_the_first_rule_that_matches_the_whole_name_decides():
  assert paths.first_match(["head/.*", ".*/kernel"], NAMES, "config.decay") == [None, 1, 1, 0, 0]
  tree = paths.match_tree([("head/.*", 7), (".*/kernel", 8)], TREE, "config.decay", default=9)
  assert tree == {
    "blocks": {"attn": {"query": {"kernel": 8, "bias": 9}}, "mlp": {"up": {"kernel": 8}}},
    "head": {"kernel": 7, "bias": 7},
  }


def test_without_a_default_every_leaf_must_be_matched():
  with pytest.raises(UserError, match=r"config\.x: no rule matches 'blocks/attn/query/bias'; end the list .* '\.\*'"):
    paths.match_tree([(".*/kernel", 1)], TREE, "config.x")


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ([".*/kernel", "kernel"], r"config\.decay\[1\]: 'kernel' matches no leaf.*closest.*try '\.\*kernel\.\*'"),
    ([".*/kernels"], r"config\.decay\[0\]: '\.\*/kernels' matches no leaf.*'head/kernel'"),
    ([".*/gamma"], r"'\.\*/gamma' matches no leaf"),
    ([".*", ".*/bias"], r"config\.decay\[1\]: '\.\*/bias' is never reached: '\.\*' before it takes .*'head/bias'"),
    (["head/.*", ".*/bias", "head/bias"], r"'head/bias' is never reached: 'head/\.\*' before it"),
    (["(.*"], r"config\.decay\[0\]: '\(\.\*' is not a regular expression"),
  ],
)
def test_a_rule_that_decides_nothing_is_an_error_with_the_reason(rules, message):
  with pytest.raises(UserError, match=message):
    paths.first_match(rules, NAMES, "config.decay")


def test_no_rules_decide_nothing():
  assert paths.first_match([], NAMES, "config.decay") == [None] * 5
