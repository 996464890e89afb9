"""`--stage=plan`: estimates memory, time, disk and money of a run on TPUs, without TPUs and without running it."""

import dataclasses
import json
import os
from typing import Any

import jax
from ml_collections import ConfigDict

from dsdm_jax.config.validate import check_callables, check_devices, flatten, resolve, validate
from dsdm_jax.core import storage
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.data import hub
from dsdm_jax.errors import UserError, visible, visible_lines
from dsdm_jax.lm import hugging_face
from dsdm_jax.plan import cost, host, page, programs, topology


def run(config: ConfigDict, workdir: str | os.PathLike | None) -> None:
  """Prints the plan and writes it to `plan_<topology>.json` in `workdir` (default: current folder).

  Raises:
    UserError: the config is invalid, the topology is unknown, or the mesh does not divide a batch.
  """
  folder = storage.check_location(workdir or '.', '--workdir')
  validate(config)
  plan = make(resolve(hub.localized(config, data=False), hugging_face.model_keys))
  slices = f'_{config.plan.slices}_slices' if config.plan.slices > 1 else ''
  name = f'plan_{config.plan.topology.replace(":", "_")}{slices}.json'
  storage.write_text(folder / name, json.dumps(plan, indent=2) + '\n')
  print(visible_lines(page.text(plan)))
  print(visible(f'plan: {folder / name}'))


def make(config: ConfigDict) -> dict[str, Any]:
  """The plan of a valid, resolved config for JSON; `stages` are `cost.Estimate`s, empty without libtpu."""
  slices, kind = config.plan.slices, topology.chip(config.plan.topology)
  chips = topology.chips(config.plan.topology) * slices
  count = chips * kind.devices
  calibration = _calibration(config.plan.calibration, kind.name)
  check_devices(config, count)
  check_callables(config)
  with jax.default_device(jax.devices('cpu')[0]):  # nothing runs; the few arrays, such as keys, are on the CPU
    compiled = topology.available()
    devices = topology.devices(config.plan.topology, slices) if compiled else jax.devices('cpu')[:1]
    mesh_config = config.mesh.copy_and_resolve_references()
    if not compiled:
      with mesh_config.unlocked():
        mesh_config.update({'replicas': 1, 'data': 1, 'model': 1})
    mesh = make_mesh(mesh_config, devices)
    works = programs.works(config, mesh)
    share, replicas = count // config.mesh.model, config.mesh.replicas or slices
    estimates, compiler = [], cost.Compiler()
    for work in works if compiled else ():
      print(visible(f'plan: compiling {work.stage}'), flush=True)
      factor = calibration.get(_measured_as(work.stage, config), 1.0)
      estimates.append(cost.estimate(work, compiler, kind.device, count, share, factor))
    j = programs.dimension(config, mesh)
    flop = {work.stage: work.flop() * work.runs for work in works}
    entries = programs.gram_entries(config, mesh)
  hosts = topology.hosts(config.plan.topology) * slices
  return {
    'topology': config.plan.topology,
    'slices': slices,
    'chips': chips,
    'accelerator_type': kind.accelerator_type(chips // slices),
    'mesh': {'replica': replicas, 'data': share // replicas, 'model': config.mesh.model},
    'rows': programs.rows(config),
    'dimension': j,
    'store_bytes': programs.stored_bytes(config, j),
    'flop': flop,
    'final_runs': programs.final_runs(config),
    'multiplier': _multiplier(flop, config),
    'hosts': hosts,
    'host_work': [
      dataclasses.asdict(work)
      for work in host.works(
        config,
        hosts,
        programs.rows(config),
        j,
        entries,
        programs.score_columns(config),
        programs.ekfac_entries(config, mesh),
      )
    ],
    'stages': [dataclasses.asdict(estimate) for estimate in estimates],
    'totals': _totals(estimates, chips, config.plan.price_per_chip_hour),
    'config': flatten(config),
  }


def _calibration(path: str, chip: str) -> dict[str, float]:
  """Program of `bench device` → measured seconds for each modelled one.

  Raises:
    UserError: the file is missing or damaged, or of another chip.
  """
  if not path:
    return {}
  try:
    content = storage.read_json(path, dict)
  except OSError as error:
    raise UserError(
      f'plan.calibration = {path!r} cannot be read ({error.strerror}); make it with: bench device'
    ) from error
  if content['chip'] != chip:
    raise UserError(
      f'plan.calibration = {path!r} was measured on {content["device"]}, but plan.topology is of {chip}; measure there'
    )
  factors = content['calibration']
  if not isinstance(factors, dict) or not all(isinstance(f, float) and 0 < f < 1e6 for f in factors.values()):
    raise UserError(f'plan.calibration = {path!r} is damaged: its factors must be positive numbers; make it again')
  return factors


def _measured_as(stage: str, config: ConfigDict) -> str:
  """The program of `bench device` that takes most time of a stage; '' for products of stored features."""
  projection = config.features.projection
  if stage in ('features', 'target_means'):
    return {'ekfac': 'per_example_gradient'}.get(projection, projection)
  if stage == 'scores' and (projection == 'ekfac' or config.features.mode == 'jvp'):
    # Several directions take a backward pass, one alone a forward-mode pass.
    return 'jvp_score' if programs.solved_vectors(config) == 1 else 'jvp_score_4_targets'
  return 'train_step' if stage.partition(' ')[0] in ('proxies', 'pretraining', 'ladder') else ''


def _multiplier(flop: dict[str, float], config: ConfigDict) -> dict[str, float]:
  """Gross is the expected compute multiplier of the selection; net also pays for the selection itself.

  A model on selected data that costs C_final is as good as one on random data that costs gross · C_final. The selection
  costs C_selection, shared by the models that use it.
  """
  selection = sum(flop.get(name, 0.0) for name in programs.SELECTION)
  final = flop['pretraining'] / programs.final_runs(config)
  gross = config.plan.multiplier
  return {
    'gross': gross,
    'selection_flop': selection,
    'final_flop': final,
    'net': gross * final / (final + selection),
    'finals_to_break_even': selection / ((gross - 1) * final) if gross > 1 else float('inf'),
  }


def _totals(estimates: list[cost.Estimate], chips: int, price: float) -> dict[str, Any]:
  fitting = [estimate for estimate in estimates if estimate.fits]
  hours = [sum(estimate.hours[end] for estimate in fitting) for end in (0, 1)]
  return {
    'hours': hours,
    'chip_hours': [h * chips for h in hours],
    'money_usd': [h * chips * price for h in hours],
    'without': [estimate.stage for estimate in estimates if not estimate.fits],
  }
