import numpy as np

from bigjax.data import mnist1d


def everything(source):
  return source.fetch(np.arange(len(source)))


def test_the_package_s_default_dataset_is_made_offline_and_nothing_else_is_seeded():
  np.random.seed(5)
  expected = np.random.rand()
  np.random.seed(5)
  train, test = everything(mnist1d.make()), everything(mnist1d.make("test"))
  assert np.random.rand() == expected
  assert train["x"].shape == (4000, 40) and test["x"].shape == (1000, 40)
  assert train["x"].dtype == np.float32 and train["label"].dtype == np.int32
  assert (np.bincount(train["label"]) + np.bincount(test["label"])).tolist() == [500] * 10
  together = np.concatenate([train["x"], test["x"]])
  np.testing.assert_allclose([together.mean(), together.std()], [0, 1], atol=1e-5)


def test_the_dataset_is_that_of_the_package():
  from mnist1d.data import get_dataset_args, make_dataset

  made = make_dataset(get_dataset_args())
  batch = mnist1d.make("train[100:102]", channel=True).fetch(np.array([1, 0]))
  np.testing.assert_array_equal(batch["x"][..., 0], made["x"][[101, 100]].astype(np.float32))
  np.testing.assert_array_equal(batch["label"], made["y"][[101, 100]])
