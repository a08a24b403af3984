import gc
import io
import itertools
import threading
import time

import numpy as np
import pytest
from PIL import Image

from bigjax.data import ops, order, pipeline
from bigjax.errors import UserError


class Files:
  """PNG files of one colour each, the example's number, and of many sizes."""

  def __init__(self, n, size=lambda i: (12 + i % 5, 12 + i % 3)):
    self.files = np.array([png(i, *size(i)) for i in range(n)], object)

  def __len__(self):
    return len(self.files)

  def fetch(self, ids):
    names = np.array([f"{i}.png" for i in ids])
    return {"image": self.files[ids], "label": ids.astype(np.int32), "file_name": names}


def png(value, height, width):
  file = io.BytesIO()
  Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(file, "PNG")
  return file.getvalue()


@ops.array_op
def noise(key: str = "label"):
  def apply(batch, keys):
    draws = order.uniform(keys, 0, 1)
    return {**batch, f"noise_{key}": draws, key: batch[key]}

  return apply


@ops.example_op
def tf_noise():
  def apply(example, seed):
    import tensorflow as tf

    return {**example, "drawn": tf.random.stateless_uniform([2], seed)}

  return apply


def ops_of(text):
  return ops.parse(text.replace("noise(", f"{__name__}.noise(").replace(f"tf_{__name__}.", f"{__name__}.tf_"))


CROP = "tf_noise()|decode|random_crop(8)|value_range(-1,1)"


def train(source, count, text=CROP, **kwargs):
  with pipeline.train_batches(source, **{"batch_size": 6, "seed": 0, "preprocess": ops_of(text)} | kwargs) as batches:
    return list(itertools.islice(batches, count))


def assert_same(a, b):
  for x, y in zip(a, b):
    assert x.keys() == y.keys()
    for name in x:
      np.testing.assert_array_equal(x[name], y[name])


def test_what_was_fetched_is_told_with_each_batch():
  told = []
  for batch in train(Files(20), 5, start_step=2, fetched=lambda *examples: told.append(examples)):
    epochs, ids, mask = told.pop(0)
    np.testing.assert_array_equal(ids, batch["label"])
    assert set(epochs.tolist()) <= {0, 1, 2} and mask.tolist() == batch["mask"].tolist() == [1.0] * 6


def test_images_are_decoded_and_cropped():
  batches = train(Files(20), 5)
  assert [b["image"].shape for b in batches] == [(6, 8, 8, 3)] * 5
  labels = np.concatenate([b["label"] for b in batches])
  pixels = np.concatenate([b["image"] for b in batches])
  for label, image in zip(labels, pixels):
    np.testing.assert_allclose(image, label / 127.5 - 1, atol=1e-6)
  assert sorted(labels[:20]) == list(range(20))
  assert batches[0]["file_name"][0] == b"%d.png" % labels[0]
  assert all(b["mask"].tolist() == [1.0] * 6 for b in batches)


def test_a_batch_depends_on_seed_and_step_alone_on_any_number_of_hosts():
  batches = train(Files(20), 30)
  assert_same(train(Files(20), 2, start_step=27), batches[27:29])
  parts = [train(Files(20), 4, host=host, hosts=3) for host in range(3)]
  joined = [{k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in zip(*parts)]
  assert_same(joined, batches[:4])
  assert (train(Files(20), 1, seed=1)[0]["drawn"] != batches[0]["drawn"]).any()


def test_both_engines_order_and_draw_alike():
  """Array ops draw the same before, between and after example ops, in batches and one by one, with tf.data or not."""
  plain = train(Files(20), 5, "keep('image','label')|noise('label')")
  for text in (
    "keep('image','label')|noise('label')|decode|random_crop(8)",
    "decode|noise('label')|random_crop(8)|keep('image','label','noise_label')",
    "decode|noise('label')|random_crop(8)|value_range(-1,1)|keep('image','label','noise_label')",
  ):
    for got, want in zip(train(Files(20), 5, text), plain):
      np.testing.assert_array_equal(got["noise_label"], want["noise_label"])
      np.testing.assert_array_equal(got["label"], want["label"])


def test_an_op_that_stands_twice_draws_twice():
  (batch,) = train(Files(20), 1, "tf_noise()|copy('drawn','first')|tf_noise()|keep('first','drawn')")
  assert (batch["first"] != batch["drawn"]).all()
  assert len(np.unique(batch["drawn"])) == 12


def test_an_array_op_between_example_ops_gives_what_it_gives_a_batch():
  between = train(Files(20), 3, "decode|central_crop(8)|value_range(-1,1)|central_crop(4)|keep('image')")
  after = train(Files(20), 3, "decode|central_crop(8)|central_crop(4)|value_range(-1,1)|keep('image')")
  assert_same(between, after)


def test_evaluation_counts_every_example_once():
  source = Files(11)
  for hosts in (1, 2):
    seen = []
    for host in range(hosts):
      preprocess = ops_of("decode|central_crop(8)")
      with pipeline.eval_batches(source, batch_size=4, preprocess=preprocess, host=host, hosts=hosts) as batches:
        batches = list(batches)
      assert len(batches) == 3
      seen += [int(i) for b in batches for i, real in zip(b["label"], b["mask"]) if real]
    assert sorted(seen) == list(range(11))


def test_spec_knows_the_crop():
  found = pipeline.spec(Files(3), ops_of("decode|random_crop(8)|value_range(-1,1)|keep('image','label')"))
  assert {k: (v.shape, str(v.dtype)) for k, v in found.items()} == {
    "image": ((8, 8, 3), "float32"),
    "label": ((), "int32"),
    "mask": ((), "float32"),
  }


def test_a_damaged_image_is_named():
  source = Files(20)
  source.files[13] = source.files[13][:60]
  with pytest.raises(UserError, match=r"decode.*In example 13 \(label 13, file_name 13.png\)"):
    train(source, 4)


def test_a_crop_larger_than_an_image_names_the_image():
  with pytest.raises(UserError, match=r"random_crop.*example \d+ .*smaller than the crop"):
    train(Files(20), 4, "decode|random_crop(15)")


def test_images_of_many_sizes_make_no_batch():
  """Also those of as many pixels, of which tf.data would make one."""
  shapes = r"\(12, 16, 3\) in the first, \(16, 12, 3\) in example 7"
  with pytest.raises(UserError, match=f"'image' with differing shapes, {shapes}"):
    train(Files(20, size=lambda i: (16, 12) if i == 7 else (12, 16)), 4, "decode")


def test_features_of_any_length_are_left_out():
  class Boxes(Files):
    def fetch(self, ids):
      boxes = np.empty(len(ids), object)
      boxes[:] = [np.zeros((i % 3, 4)) for i in ids]
      return super().fetch(ids) | {"boxes": boxes}

  with pytest.raises(UserError, match=r"'boxes' has another shape in every example: begin with drop\('boxes'\)"):
    train(Boxes(20), 1)
  assert train(Boxes(20), 1, f"drop('boxes')|{CROP}")[0]["image"].shape == (6, 8, 8, 3)


def test_what_a_source_raises_is_raised_as_it_was():
  class Broken(Files):
    def fetch(self, ids):
      if 5 in ids:
        raise KeyError("record 5")
      return super().fetch(ids)

  with pytest.raises(KeyError, match="record 5"):
    train(Broken(20), 4)


def test_closing_early_leaves_nothing_running_even_in_the_middle_of_a_fetch():
  class Slow(Files):
    def fetch(self, ids):
      time.sleep(0.05)
      return super().fetch(ids)

  before = threading.active_count()
  for _ in range(3):
    with pipeline.train_batches(Slow(20), batch_size=4, seed=0, preprocess=ops_of("decode|random_crop(8)")) as batches:
      next(batches)
  del batches
  gc.collect()
  assert threading.active_count() <= before
