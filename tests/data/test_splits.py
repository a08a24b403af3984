import numpy as np
import pytest

from bigjax.data import splits
from bigjax.errors import UserError


def picked(split, size=10, seed=None, sizes=None):
  _, subset = splits.parse(split, sizes or {"train": size}, seed)
  rows = np.arange(subset.size)[subset.rows()]
  assert len(rows) == len(subset)
  return rows.tolist()


@pytest.mark.parametrize(
  ("split", "expected"),
  [
    ("train", list(range(10))),
    ("[:]", list(range(10))),
    ("train[:80%]", [0, 1, 2, 3, 4, 5, 6, 7]),
    ("[80%:]", [8, 9]),
    ("[2:5]", [2, 3, 4]),
    ("train[-3:]", [7, 8, 9]),
    ("[:-80%]", [0, 1]),
    ("[ :10% ] + [ 90%: ]", [0, 9]),
    ("[8:]+[:2]", [8, 9, 0, 1]),
  ],
)
def test_slices_mean_what_they_mean_in_tfds(split, expected):
  assert picked(split) == expected


def test_percentages_round_to_the_nearest_example_as_in_tfds():
  assert picked("[:33%]", size=5) == [0, 1]  # 1.65
  assert picked("[:25%]", size=9) == [0, 1]  # 2.25


def test_complementary_slices_of_one_seed_share_no_example_and_leave_none_out():
  train, test = picked("[:80%]", size=1797, seed=3), picked("[80%:]", size=1797, seed=3)
  assert len(train) == 1438
  assert sorted(train + test) == list(range(1797))
  assert train != sorted(train)


def test_another_seed_cuts_other_parts():
  assert picked("[:50%]", size=100, seed=0) != picked("[:50%]", size=100, seed=1)


def test_folds_partition_and_their_complements_complete_them():
  folds = [picked(f"fold({i},5)", size=569) for i in range(5)]
  assert sorted(i for fold in folds for i in fold) == list(range(569))
  assert {len(f) for f in folds} == {113, 114}
  for i, fold in enumerate(folds):
    assert sorted(fold + picked(f"not_fold({i},5)", size=569)) == list(range(569))
  assert folds[0] != sorted(folds[0])


def test_a_split_of_several_is_chosen_by_name():
  sizes = {"train": 8, "test": 2}
  assert picked("test", sizes=sizes) == [0, 1]
  assert len(picked("train.fold(0,4)", sizes=sizes)) == 2
  with pytest.raises(UserError, match="doesn't say of which split: train, test"):
    picked("[:50%]", sizes=sizes)


@pytest.mark.parametrize(
  ("split", "message"),
  [
    ("tran", "there is no split 'tran'. Did you mean 'train'"),
    ("train[:80 percent]", "is not understood"),
    ("", "is not understood"),
    ("[1:2]+", "is not understood"),
    ("[5:20]", "examples 5 to 20; there are 10"),
    ("[-20:]", "examples -10 to 10"),
    ("[3:3]", "no examples"),
    ("[:5]+[4:]", "twice"),
    ("fold(5,5)", "below the number of folds"),
    ("fold(0,11)", "from 2 to 10"),
  ],
)
def test_what_can_not_be_meant_is_told(split, message):
  with pytest.raises(UserError, match=message):
    picked(split)
