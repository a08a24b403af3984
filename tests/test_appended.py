"""What is added to a file is there in order, once, whenever the disk takes it; and nothing counts before."""

import errno
import os

import pytest

from bigjax import appended
from bigjax.appended import Appended


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
  monkeypatch.setattr(appended, "BACK_OFF", (0, 0))


class Refusing:
  """Has a function of the system fail while `error` is set, after a part of the work."""

  def __init__(self, monkeypatch, name, part=lambda call, *args: None):
    self.error, call = None, getattr(os, name)

    def refusing(*args):
      if self.error:
        part(call, *args)
        raise OSError(self.error, os.strerror(self.error))
      return call(*args)

    monkeypatch.setattr(appended.os, name, refusing)


def test_what_is_refused_waits_and_comes_in_order(tmp_path, monkeypatch, capsys):
  disk = Refusing(monkeypatch, "write")
  file = Appended(tmp_path / "rows")
  file.append(b"1")
  disk.error = errno.ENOSPC
  file.append(b"2")
  file.append(b"3")
  file.flush()
  with pytest.raises(OSError, match="rows: No space left"):
    appended.settle()
  assert (tmp_path / "rows").read_bytes() == b"1"
  disk.error = None
  file.append(b"4")
  assert (tmp_path / "rows").read_bytes() == b"1234"
  appended.settle()
  file.close()
  told = capsys.readouterr().err
  assert told.count("can't be written: No space left") == told.count("is written again") == 1


def test_what_a_network_s_disk_drops_when_it_is_to_be_durable_is_written_anew(tmp_path, monkeypatch):
  drop = lambda call, descriptor: os.ftruncate(descriptor, os.fstat(descriptor).st_size - 2)
  disk = Refusing(monkeypatch, "fsync", drop)
  file = Appended(tmp_path / "rows").open()
  file.append(b"123")
  file.settle()
  file.append(b"456")
  disk.error = errno.EDQUOT
  file.flush()
  assert (tmp_path / "rows").read_bytes() == b"1234"
  disk.error = None
  file.append(b"7")
  file.close()
  assert (tmp_path / "rows").read_bytes() == b"1234567"


def test_it_is_tried_again_less_and_less_often(tmp_path, monkeypatch):
  now, tried = [0.0], []
  monkeypatch.setattr(appended, "BACK_OFF", (1.0, 60.0))
  monkeypatch.setattr(appended.time, "monotonic", lambda: now[0])
  disk = Refusing(monkeypatch, "write", lambda *args: tried.append(now[0]))
  disk.error = errno.EROFS
  file = Appended(tmp_path / "rows")
  for second in range(200):
    now[0] = float(second)
    file.append(b".")
  assert tried == [0, 1, 3, 7, 15, 31, 63, 123, 183]
  disk.error = None
  file.close()
  assert (tmp_path / "rows").read_bytes() == b"." * 200


def test_no_more_than_so_much_waits(tmp_path, monkeypatch):
  monkeypatch.setattr(appended, "KEPT", 100)
  disk = Refusing(monkeypatch, "write")
  file = Appended(tmp_path / "rows")
  disk.error = errno.ENOSPC
  file.append(b"." * 99)
  with pytest.raises(OSError, match="goes on from the last checkpoint"):
    file.append(b"..")
  disk.error = None
  file.close()


def test_what_is_closed_with_rows_left_is_an_error_and_holds_nothing_up_afterwards(tmp_path, monkeypatch):
  disk = Refusing(monkeypatch, "write")
  file = Appended(tmp_path / "rows")
  disk.error = errno.ENOSPC
  file.append(b"1")
  with pytest.raises(OSError, match="No space left"):
    file.close()
  appended.settle()
