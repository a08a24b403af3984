"""How fast the input pipeline alone feeds, with nothing behind it: small images, and JPEG crops beside bare tf.data.

Command   python scripts/bench/input_pipeline.py [--rounds=5]
Expected  2 CPU cores: small images at 100,000 a second or more, JPEG crops at 90% or more of bare tf.data

The JPEGs are made here: 500 x 375 pixels, about 100 kB, as ImageNet's are. Bare tf.data is what one would write by
hand with the same ops: shuffle, decode and crop, resize, flip, scale, batch, prefetch. The two take turns, so that what
else the machine does meets both; the ratio is that of the medians.
"""

import argparse
import itertools
import time

import numpy as np

from bigjax.data import ops, pipeline, tfdata


class Arrays:
  """Examples in memory."""

  def __init__(self, **features):
    self.features = features

  def __len__(self):
    return len(self.features["label"])

  def fetch(self, ids):
    return {name: values[ids] for name, values in self.features.items()}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  parser.add_argument("--rounds", type=int, default=5, help="measurements of each")
  rounds = parser.parse_args().rounds
  rates = small_images(rounds)
  print(f"28 x 28 images, value_range  {np.median(rates):12,.0f}/s  {np.median(rates) / 100_000:.2f} of 100,000/s")
  ours, bare = jpeg_crops(rounds)
  print(f"224-pixel JPEG crops         {np.median(ours):12,.0f}/s")
  print(f"the same in bare tf.data     {np.median(bare):12,.0f}/s  ratio {np.median(ours) / np.median(bare):.2f}")


def small_images(rounds, n=60_000, batch_size=128):
  """Returns images a second of `rounds` measurements."""
  rng = np.random.default_rng(0)
  source = Arrays(image=rng.integers(0, 256, (n, 28, 28, 1), np.uint8), label=rng.integers(0, 10, n, np.int32))
  preprocess = ops.parse("value_range(-1,1)")
  with pipeline.train_batches(source, batch_size=batch_size, seed=0, preprocess=preprocess) as batches:
    return [rate(batches, batch_size, steps=400) for _ in range(rounds)]


def jpeg_crops(rounds, n=256, batch_size=64):
  """Returns images a second of this pipeline and of bare tf.data, `rounds` measurements of each."""
  tf = tfdata.tensorflow()
  source = Arrays(image=np.array([jpeg(tf, i) for i in range(n)], object), label=np.arange(n, dtype=np.int32))
  preprocess = ops.parse("inception_crop(224)|flip_lr|value_range(-1,1)")
  bare = bare_tfdata(tf, source.features, batch_size)
  with pipeline.train_batches(source, batch_size=batch_size, seed=0, preprocess=preprocess) as batches:
    pairs = [(rate(batches, batch_size, steps=20), rate(bare, batch_size, steps=20)) for _ in range(rounds)]
  return zip(*pairs)


def bare_tfdata(tf, features, batch_size):
  def augment(example, seed):
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
      tf.image.extract_jpeg_shape(example["image"]),
      tf.zeros([1, 0, 4]),
      seed,
      min_object_covered=0.0,
      aspect_ratio_range=(3 / 4, 4 / 3),
      area_range=(0.05, 1.0),
      use_image_if_no_bounding_boxes=True,
    )
    image = tf.image.decode_and_crop_jpeg(example["image"], tf.concat([begin[:2], size[:2]], 0), channels=3)
    image = tf.image.resize(image, (224, 224))
    image = tf.image.stateless_random_flip_left_right(image, seed)
    return example | {"image": image * (2 / 255) - 1}

  dataset = tf.data.Dataset.from_tensor_slices(features).repeat().shuffle(256, seed=0)
  seeds = tf.data.Dataset.random(seed=0).batch(2).map(lambda seed: tf.cast(seed, tf.int32))
  dataset = tf.data.Dataset.zip(dataset, seeds).map(augment, num_parallel_calls=tf.data.AUTOTUNE)
  return dataset.batch(batch_size, drop_remainder=True).prefetch(2).as_numpy_iterator()


def jpeg(tf, i, height=375, width=500):
  """A noisy pattern that compresses about as a photograph does."""
  rng = np.random.default_rng(i)
  y, x = np.mgrid[:height, :width]
  waves = [np.sin(x / rng.uniform(5, 50) + y / rng.uniform(-50, 50)) for _ in range(3)]
  pixels = 128 + 80 * np.stack(waves, -1) + rng.normal(0, 14, (height, width, 3))
  return tf.io.encode_jpeg(pixels.clip(0, 255).astype(np.uint8), quality=85).numpy()


def rate(batches, batch_size, steps):
  """Returns examples a second, after a few batches to warm up."""
  for _ in itertools.islice(batches, 3):
    pass
  start = time.perf_counter()
  for _ in itertools.islice(batches, steps):
    pass
  return batch_size * steps / (time.perf_counter() - start)


if __name__ == "__main__":
  main()
