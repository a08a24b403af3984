"""Where a plan is made for: a mesh that doesn't fit says which do; data that aren't here don't have to be."""

import pytest

import bigjax
from bigjax.errors import UserError
from bigjax.plan import prepare


def test_a_mesh_that_does_not_fit_says_which_do(small):
  config = bigjax.resolve(small(mesh=(("data", 3), ("tensor", 2))))
  with pytest.raises(UserError) as e:
    prepare.prepare(config, "h100:8")
  assert "is for 6 devices or a multiple; h100:8 has 8. These fit: (data 4, tensor 2)" in str(e.value)
  assert "(data 2, tensor 4)" in str(e.value) and "(data 8, tensor 1)" in str(e.value)


def test_every_shape_is_a_product_of_its_sides():
  assert sorted(prepare._shapes(8, 2)) == [(1, 8), (2, 4), (4, 2), (8, 1)]
  assert len(prepare._shapes(64, 3)) == 28


@pytest.mark.parametrize(
  ("source", "features"),
  [
    (dict(name="tokens", path="nowhere", block=32), {"tokens": (33,)}),
    (
      dict(name="tokens", path="nowhere", block=32, documents="packed"),
      dict.fromkeys(("tokens", "segments", "positions"), (33,)),
    ),
    (dict(name="text", path="nowhere.txt", block=32), {"tokens": (33,)}),
  ],
)
def test_what_stands_in_has_the_shapes_of_the_data(source, features, small):
  prepared = prepare.prepare(bigjax.resolve(small(data=dict(source=source))), "h100:8")
  assert prepared.stands_in
  assert {n: v.shape[1:] for n, v in prepared.run.batch.items() if n != "mask"} == features
  assert prepared.steps == 1000


def test_a_run_in_epochs_of_data_that_are_not_here_has_no_length(small):
  source = dict(name="tokens", path="nowhere", block=32)
  prepared = prepare.prepare(bigjax.resolve(small(data=dict(source=source), total_steps="2 epochs")), "h100:8")
  assert prepared.steps is None


def test_what_no_source_can_stand_in_for_is_missed_by_name(small):
  source = dict(name="arrays", path="nowhere.csv", hint="fetch it")
  config = small(data=dict(source=source), model=dict(name="mlp", in_features=3, widths=(4,), num_outputs=2))
  with pytest.raises(UserError, match=r"nowhere\.csv.*fetch it"):
    prepare.prepare(bigjax.resolve(config | dict(task=dict(name="classification"), precision="float32")), "h100:8")
