"""What `bigjax data prepare` makes of images and files holds what they hold, and reads as any TFDS dataset."""

import gzip
import io
import os
import struct

import numpy as np
import pytest
import tensorflow_datasets as tfds_library  # noqa: TID253
from PIL import Image

from bigjax.commands import data
from bigjax.data import prepare, tfds
from bigjax.errors import UserError


def image(path, colour, kind=None, size=(7, 5)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", size, colour).save(path, kind)
  return path


@pytest.fixture
def animals(tmp_path):
  """Ten cats and twenty dogs, JPEG and PNG, with a note among them."""
  for i in range(10):
    image(tmp_path / f"animals/cat/{i}.png", (i, 0, 0))
  for i in range(20):
    image(tmp_path / f"animals/dog/{i}.jpeg", (0, 10 * i, 0))
  (tmp_path / "animals/cat/notes.txt").write_text("good cats")
  (tmp_path / "animals/cat/.DS_Store").write_text("")
  return tmp_path / "animals"


def everything(dataset, split, data_dir):
  source = tfds.make(dataset, split=split, data_dir=os.fspath(data_dir))
  return source.fetch(np.arange(len(source)))


def test_a_folder_of_images_becomes_a_dataset_of_the_same_files(animals, tmp_path, capsys):
  assert data.main(["prepare", "images", str(animals), "--name=animals", f"--data_dir={tmp_path}/tfds"]) == 0
  told = capsys.readouterr().out
  assert "Left out 1 files that are no images: cat/notes.txt" in told
  assert f"animals:1.0.0 in {tmp_path}/tfds: train 30 examples (array_record)" in told
  batch = everything("animals", "train", tmp_path / "tfds")
  found = sorted(zip(batch["label"].tolist(), batch["image"].tolist()))
  files = [
    (label, p.read_bytes()) for label, name in enumerate(("cat", "dog")) for p in (animals / name).glob("[0-9]*")
  ]
  assert found == sorted(files)
  # In an order of its own, so that a slice is a fair sample.
  assert 0 < batch["label"][:10].sum() < 10
  # The line that was told, tried as a config.
  line = next(line for line in told.splitlines() if line.startswith("  config.data ="))
  config = eval(line.removeprefix("  config.data ="))
  assert config["preprocess"] == "decode|..."
  source = config["source"]
  assert source.pop("name") == "tfds"
  assert len(tfds.make(source.pop("dataset"), **source)) == 30


def test_tfds_itself_reads_it(animals, tmp_path):
  made = prepare.from_images(
    str(animals), dataset="animals", test=0.2, data_dir=str(tmp_path / "tfds"), file_format="tfrecord", version="2.0.1"
  )
  assert (made.dataset, made.file_format, made.splits) == ("animals:2.0.1", "tfrecord", {"train": 24, "test": 6})
  dataset, info = tfds_library.load("animals", split="test", data_dir=tmp_path / "tfds", download=False, with_info=True)
  assert info.features["label"].names == ["cat", "dog"]
  found = [(int(e["label"]), e["image"][0, 0].tolist()) for e in dataset.as_numpy_iterator()]
  assert [label for label, _ in found].count(0) == 2
  assert all(pixel[1:] == [0, 0] for label, pixel in found if label == 0)


def test_held_out_images_are_the_same_again_and_in_one_split_only(animals, tmp_path):
  made = [
    {s: sorted(everything("animals", s, tmp_path / n)["image"].tolist()) for s in ("train", "test")}
    for n in "ab"
    if prepare.from_images(str(animals), dataset="animals", test=0.3, data_dir=str(tmp_path / n))
  ]
  assert made[0] == made[1]
  assert len({*made[0]["train"], *made[0]["test"]}) == 30 and len(made[0]["test"]) == 9


def test_split_folders_are_the_splits(tmp_path):
  for split, name, count in (("train", "a", 3), ("train", "b", 2), ("test", "b", 1)):
    for i in range(count):
      image(tmp_path / f"in/{split}/{name}/{i}.png", (i, 0, 0))
  made = prepare.from_images(str(tmp_path / "in"), dataset="letters", data_dir=str(tmp_path / "tfds"))
  assert made.splits == {"test": 1, "train": 5}
  assert everything("letters", "test", tmp_path / "tfds")["label"].tolist() == [1]
  with pytest.raises(UserError, match=r"has splits already \(test, train\): leave test out"):
    prepare.from_images(str(tmp_path / "in"), dataset="letters2", test=0.1, data_dir=str(tmp_path / "tfds"))


def test_damaged_images_are_found_and_all_named(animals, tmp_path):
  for name in ("cat/3.png", "dog/4.jpeg"):
    (animals / name).write_bytes((animals / name).read_bytes()[:-20])
  (animals / "dog/5.jpeg").write_text("404 not found")
  # Whole, though something follows its end.
  (animals / "dog/6.jpeg").write_bytes((animals / "dog/6.jpeg").read_bytes() + b"camera's own data")
  with pytest.raises(UserError) as error:
    prepare.from_images(str(animals), dataset="animals", data_dir=str(tmp_path / "tfds"))
  assert "3 of the images are cut short or damaged" in str(error.value)
  assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
    str(animals / name) for name in ("cat/3.png", "dog/4.jpeg", "dog/5.jpeg")
  ]
  assert not (tmp_path / "tfds").exists()


def test_a_csv_becomes_a_dataset_with_named_classes(tmp_path, capsys):
  rows = [f"{i},{i / 4},{'setosa' if i % 2 else 'virginica'}" for i in range(20)]
  (tmp_path / "iris.csv").write_text("id,width,species\n" + "\n".join(rows) + "\n")
  file = tmp_path / "iris.csv"
  arguments = ["--name=iris", f"--data_dir={tmp_path}/tfds", "--label=species", "--drop=('id',)"]
  assert data.main(["prepare", "files", f"train={file}[:75%]", f"test={file}[75%:]", *arguments]) == 0
  assert "train 15, test 5 examples" in capsys.readouterr().out
  batch = everything("iris", "test", tmp_path / "tfds")
  order = np.argsort(batch["x"][:, 0])
  np.testing.assert_array_equal(batch["x"][order], np.arange(15, 20, dtype=np.float32)[:, None] / 4)
  np.testing.assert_array_equal(batch["label"][order], [0, 1, 0, 1, 0])
  info = tfds_library.builder_from_directory(tmp_path / "tfds/iris/1.0.0").info
  assert info.features["label"].names == ["setosa", "virginica"]
  assert data.main(["list", f"--data_dir={tmp_path}/tfds"]) == 0
  assert "iris:1.0.0  array_record; train 15, test 5\n1 dataset in" in capsys.readouterr().out


def idx(array):
  return gzip.compress(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def test_idx_files_become_images_that_need_no_decoding(tmp_path):
  rng = np.random.default_rng(0)
  images, labels = rng.integers(256, size=(12, 4, 4)).astype(np.uint8), np.arange(12, dtype=np.uint8)
  (tmp_path / "images.gz").write_bytes(idx(images))
  (tmp_path / "labels.gz").write_bytes(idx(labels))
  files = f"train={tmp_path}/images.gz,{tmp_path}/labels.gz"
  where = f"--data_dir={tmp_path}/tfds"
  data.main(["prepare", "files", files, "--name=mnist_like", where, "--file_format=tfrecord"])
  batch = everything("mnist_like", "train", tmp_path / "tfds")
  assert batch["image"].dtype == np.uint8
  np.testing.assert_array_equal(batch["image"], images[batch["label"], ..., None])
  (example,) = tfds_library.load("mnist_like", split="train[:1]", data_dir=tmp_path / "tfds", download=False)
  np.testing.assert_array_equal(example["image"], batch["image"][0])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["images", "{tmp}/nowhere", "--name=x"], "there is no folder"),
    (["images", "{tmp}/animals", "--name=My-Pets"], "'My-Pets' can't be the name of a dataset"),
    (["images", "{tmp}/animals", "--name=x", "--version=1"], "version='1' must be three numbers"),
    (["images", "{tmp}/animals", "--name=x", "--test=1.5"], "test=1.5 is not a part"),
    (["images", "{tmp}/animals/cat", "--name=x"], "Lay them out as CLASS/1.jpg"),
    (["files", "{tmp}/a.npz", "--name=x"], "is not SPLIT=FILE"),
    (["files", "train={tmp}/a.npz", "train={tmp}/a.npz", "--name=x"], "the split 'train' is given twice"),
    (["files", "all={tmp}/a.npz", "--name=x"], "'all' can't be the name of a split"),
    (["files", "train={tmp}/a.npz", "--name=x", "--labell=y"], "files.labell is not an argument.*Did you mean 'label'"),
    (["files", "train={tmp}/a.npz", "test={tmp}/b.npz", "--name=x"], "train and test differ in 'image'"),
    (["tfds", "mnits"], "TFDS has no dataset 'mnits'. Did you mean 'mnist'"),
  ],
)
def test_a_mistake_is_one_message(animals, tmp_path, arguments, message):
  np.savez(tmp_path / "a.npz", image=np.zeros((3, 2, 2), np.uint8))
  np.savez(tmp_path / "b.npz", image=np.zeros((3, 2, 3), np.uint8))
  arguments = [a.format(tmp=tmp_path) for a in arguments]
  with pytest.raises(UserError, match=message):
    data.main(["prepare", *arguments, f"--data_dir={tmp_path}/tfds"])
  assert not list((tmp_path / "tfds").glob("*/*"))


def test_what_is_there_already_is_left_alone(tmp_path):
  np.savez(tmp_path / "a.npz", x=np.zeros((3, 2)))
  arguments = ["prepare", "files", f"train={tmp_path}/a.npz", "--name=x", f"--data_dir={tmp_path}/tfds"]
  data.main(arguments)
  with pytest.raises(UserError, match="x/1.0.0 is there already. Choose another --version"):
    data.main(arguments)
  assert data.main([*arguments, "--version=1.0.1"]) == 0


def test_a_folder_that_cannot_be_made_is_an_error(animals, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="data_dir='.*file/tfds' can't be made: Not a directory"):
    prepare.from_images(str(animals), dataset="x", data_dir=str(tmp_path / "file/tfds"))


def test_grey_and_tiny_files_pass_the_check(tmp_path):
  for kind in ("PNG", "JPEG", "GIF", "BMP"):
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, kind)
    (tmp_path / f"in/{kind}").mkdir(parents=True)
    (tmp_path / f"in/{kind}/1.{kind.lower()}").write_bytes(file.getvalue())
  made = prepare.from_images(str(tmp_path / "in"), dataset="kinds", data_dir=str(tmp_path / "tfds"))
  assert made.splits == {"train": 4}


class Waves(tfds_library.core.GeneratorBasedBuilder):
  """A dataset of TFDS's kind, as its catalogue has them; `fail` stands for what downloads meet."""

  VERSION = tfds_library.core.Version("1.0.0")
  MANUAL_DOWNLOAD_INSTRUCTIONS = "Put waves.npy there."
  fail = None

  def _info(self):
    return tfds_library.core.DatasetInfo(builder=self, features=tfds_library.features.FeaturesDict({"x": np.float32}))

  def _split_generators(self, dl_manager):
    if self.fail:
      raise self.fail
    return {"train": self._generate_examples(dl_manager.manual_dir / "waves.npy")}

  def _generate_examples(self, path):
    yield from ((i, {"x": x}) for i, x in enumerate(np.load(path)))


def test_a_dataset_of_tfds_is_prepared_by_its_own_code(tmp_path, capsys, monkeypatch):
  arguments = ["prepare", "tfds", "waves", f"--data_dir={tmp_path}/tfds", f"--manual_dir={tmp_path}/manual"]
  with pytest.raises(UserError, match="(?s)waves: .*Put waves.npy there.*name their folder by --manual_dir"):
    data.main(arguments[:-1])
  (tmp_path / "manual").mkdir()
  np.save(tmp_path / "manual/waves.npy", np.sin(np.arange(9)))
  monkeypatch.setattr(Waves, "fail", ConnectionError("Failed to resolve 'example.org'"))
  with pytest.raises(UserError, match="(?s)waves can't be downloaded: .*example.org.*copy its folder into data_dir"):
    data.main(arguments)
  monkeypatch.setattr(Waves, "fail", None)
  assert data.main(arguments) == 0
  assert "waves:1.0.0 in" in capsys.readouterr().out
  np.testing.assert_allclose(sorted(everything("waves", "train", tmp_path / "tfds")["x"]), sorted(np.sin(range(9))))
