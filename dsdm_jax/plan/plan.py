"""`--stage=plan`: what a run takes on TPUs that are not there: memory, time, disk and money, before anything starts."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from dsdm_jax.config.validate import check_callables, check_devices, flatten, resolve, validate
from dsdm_jax.core import storage
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.lm import hugging_face
from dsdm_jax.plan import cost, page, programs, topology
from dsdm_jax.plan.chips import chip
from dsdm_jax.plan.programs import Work


def run(config: ConfigDict, workdir: str | os.PathLike | None) -> None:
  """Prints the plan for `plan.topology` and writes it to `plan_<topology>.json` in `workdir` (None: where one stands).

  Raises:
    UserError: bad config, an unknown topology, batches that the mesh does not divide.
  """
  validate(config)
  found = make(resolve(config, hugging_face.model_keys))
  name = f'plan_{config.plan.topology.replace(":", "_")}.json'
  folder = Path(workdir or '.')
  folder.mkdir(parents=True, exist_ok=True)
  storage.write_text(folder / name, json.dumps(found, indent=2) + '\n')
  print(page.text(found))
  print(f'plan: {folder / name}')


def make(config: ConfigDict) -> dict[str, Any]:
  """The plan of a valid, resolved config as JSON holds it; `stages` are of `cost.Estimate`, empty without libtpu."""
  count, kind = topology.chips(config.plan.topology), chip(config.plan.topology)
  check_devices(config, count)
  check_callables(config)
  with _no_accelerator():
    compiled = topology.available()
    devices = topology.devices(config.plan.topology) if compiled else jax.devices('cpu')[:1]
    mesh_config = config.mesh.copy_and_resolve_references()
    if not compiled:
      with mesh_config.unlocked():
        mesh_config.update({'data': 1, 'model': 1})
    mesh = make_mesh(mesh_config, devices)
    works = programs.works(config, mesh)
    share = count // config.mesh.model
    estimates, compiler = [], cost.Compiler()
    for work in works if compiled else ():
      print(f'plan: compiles {work.stage}', flush=True)
      estimates.append(cost.estimate(work, compiler, kind, count, share, config.plan.calibration))
    j = programs.dimension(config, mesh)
  return {
    'topology': config.plan.topology,
    'chips': count,
    'accelerator_type': kind.accelerator_type(count),
    'mesh': {'data': share, 'model': config.mesh.model},
    'rows': programs.rows(config),
    'dimension': j,
    'store_bytes': programs.stored_bytes(config, j),
    'flop': _flop(works),
    'final_runs': programs.final_runs(config),
    'multiplier': _multiplier(works, config),
    'stages': [dataclasses.asdict(estimate) for estimate in estimates],
    'totals': _totals(estimates, count, config.plan.price_per_chip_hour),
    'config': flatten(config),
  }


def _flop(works: list[Work]) -> dict[str, float]:
  """Of each stage, all runs together."""
  return {work.stage: work.flop() * work.runs for work in works}


def _multiplier(works: list[Work], config: ConfigDict) -> dict[str, float]:
  """Gross is what selection is hoped to save; net is what it saves once choosing has been paid for.

  A model on chosen data that costs C_final is as good as one on random data that costs gross · C_final. Choosing costs
  C_selection, shared by the models that use the choice.
  """
  flop = _flop(works)
  selection = sum(flop[name] for name in programs.SELECTION)
  final = flop['pretraining'] / programs.final_runs(config)
  gross = config.plan.multiplier
  return {
    'gross': gross, 'selection_flop': selection, 'final_flop': final, 'net': gross * final / (final + selection),
    'finals_to_break_even': selection / ((gross - 1) * final) if gross > 1 else float('inf'),
  }  # fmt: skip


def _totals(estimates: list[cost.Estimate], chips: int, price: float) -> dict[str, Any]:
  fitting = [estimate for estimate in estimates if estimate.fits]
  hours = [sum(estimate.hours[end] for estimate in fitting) for end in (0, 1)]
  return {
    'hours': hours, 'chip_hours': [h * chips for h in hours], 'money_usd': [h * chips * price for h in hours],
    'without': [estimate.stage for estimate in estimates if not estimate.fits],
  }  # fmt: skip


@contextlib.contextmanager
def _no_accelerator() -> Iterator[None]:
  """Planning runs nothing: what must be an array, as keys are, is one of the CPU."""
  with jax.default_device(jax.devices('cpu')[0]):
    yield
