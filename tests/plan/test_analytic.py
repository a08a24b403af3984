"""Estimates without a compiler: bytes and seconds by hand; GPUs are planned by them alone, and it is said."""

import json

import pytest

import bigjax
from bigjax import main
from bigjax.plan import analytic, changes, prepare, report, text, work

GIB = 2**30


def prepared(config, topology="h100:8"):
  return prepare.prepare(bigjax.resolve(config), topology)


def test_the_state_is_counted_to_the_byte(small):
  found = analytic.memory(prepared(small()))
  layer = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
  params = 2 * 512 * 64 + 4 * layer + 64
  norms = 4 * (4 * 2 * 64 + 64)  # Below the size at which fsdp splits an array; they are whole on each device.
  assert found["params"] == (4 * params - norms) // 8 + norms
  assert 2 * found["params"] < found["optimizer"] < 2 * found["params"] + 32  # Two moments, and a few numbers.
  assert found["batch"] == 2 * (65 * 4 + 4)


def test_what_remat_keeps_is_read_off_the_traced_loss(small):
  kept = {r: analytic.kept(prepared(small(model__remat=r)).run) for r in ("none", "dots", "full")}
  assert kept["none"] > kept["dots"] > kept["full"]
  inputs = 4 * 2 * 64 * 64 * 2  # Of four layers, two examples of 64 tokens a device, bfloat16.
  assert inputs <= kept["full"] <= inputs + 2 * 64 * (3 * 512 * 4 + 20 * 64)  # And what is around the layers.


def test_more_parts_and_smaller_logits_take_less(small):
  memory = lambda **c: analytic.memory(prepared(small(**c)))
  whole = memory()
  assert memory(accumulate=2)["activations"] == whole["activations"] // 2
  assert memory(task__loss_chunks=4)["logits"] == whole["logits"] // 4 == 2 * 2 * 64 * 512 * 4 // 4


def test_the_least_time_is_products_at_the_peak_and_bytes_over_links(small):
  it = prepared(small(mesh=(("data", 8),)))
  flops = work.of(it.run)
  found = analytic.estimate(it, flops)
  assert found["bounds"]["compute"] == pytest.approx(flops.total / 8 / 989e12)
  split = sum(size for _, size, _ in analytic.gathers(it.run))
  assert split == 2 * (2 * 512 * 64 + 4 * (4 * 64 * 64 + 3 * 64 * 128))
  whole = 4 * (2 * 512 * 64 + 4 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64)
  assert found["bounds"]["switch data"] == pytest.approx((2 * split + whole) * 7 / 8 / 450e9)


def test_a_gpu_is_planned_by_estimates_alone_and_says_so(small):
  found = report.make(prepared(small()))
  assert not found["compiled"] and found["compile_seconds"] is None
  assert found["memory"]["total"] == found["estimate"]["memory"]["total"]
  assert found["time"]["bound_by"] in found["time"]["bounds"]
  assert "estimates alone" in text.table(found) and "estimate without a compiler" in text.table(found)
  assert len(found["memory"]["buffers"]) == 10
  lines = {b["line"].partition(":")[0] for b in found["memory"]["buffers"] if b["line"]}
  assert lines and all(line.startswith(("bigjax/models/", "bigjax/tasks/")) for line in lines)


def test_between_hosts_of_gpus_no_bandwidth_is_published(small):
  it = prepare.prepare(bigjax.resolve(small(mesh=(("data", 8),))), "h100:8")
  for device, chips in ((it, 8), (it, 4)):
    profile = device.profile.__class__(**{**vars(device.profile), "chips_a_host": chips})
    found = analytic.estimate(prepare.Prepared(it.run, it.config, *it.where, profile, False), work.of(it.run))
    assert ("switch data" in found["bounds"]) == (chips == 8)


def test_what_does_not_fit_says_how_much_is_missing_and_the_cheapest_change_that_fits(small):
  config = small(batch_size=2**21, model__remat="none")
  found = report.make(prepared(config))
  assert not found["fits"]
  assert found["memory"]["missing"] == found["memory"]["total"] - 80 * 10**9 > 0
  first = next(r for r in found["memory"]["remedies"] if r["fits"])
  line = next(line for line in text.table(found).splitlines() if "fits with" in line)
  assert first["flags"] in line and first["flags"].startswith("--config.")
  again = changes.apply(bigjax.resolve(config), {"task.loss_chunks": 8})
  assert again.task.kwargs["loss_chunks"] == 8


def test_experts_on_devices_of_their_own_may_be_given_a_capacity(small):
  experts = dict(
    model__experts=8, model__top_k=4, model__remat="full", mesh=(("data", 2), ("expert", 4)), sharding="fsdp+expert"
  )
  roomy = report.make(prepared(small(batch_size=2**20, **experts)))
  remedies = [r for r in roomy["memory"]["remedies"] if r["flags"] == "--config.model.capacity_factor=1.25"]
  assert len(remedies) == 1 and remedies[0]["about"] < roomy["memory"]["total"]
  limited = report.make(prepared(small(batch_size=2**20, model__capacity_factor=1.25, **experts)))
  assert not any("capacity" in r["flags"] for r in limited["memory"]["remedies"])


def test_the_command_prints_json_and_writes_a_page_that_shows_no_config_as_html(small, tmp_path, capsys):
  (tmp_path / "config.json").write_text(json.dumps(small(mesh=(("data", 8),))))
  flags = [f"--config={tmp_path / 'config.json'}", "--topology=h100:8", "--json", f"--out={tmp_path / 'out'}"]
  assert main.main(["plan", *flags, "--price=2"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert main.main(["plan", *flags, "--price=-2"]) == 2 and "--price" in capsys.readouterr().err
  assert found["run"]["cost"] == pytest.approx(2 * found["run"]["chip_hours"])
  page = (tmp_path / "out" / "plan.html").read_text()
  assert page.startswith("<!doctype html>") and "decoder on h100:8" in page
  against = [f"--config={tmp_path / 'config.json'}", "--topology=h100:8", f"--against={tmp_path}/out/plan.json"]
  assert main.main(["plan", *against, "--config.model.depth=2"]) == 0
  assert "memory.params" in capsys.readouterr().out
