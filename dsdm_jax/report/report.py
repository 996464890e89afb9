"""Stage `report`: the HTML page, its figures and data as files, and a figure of the result for a README."""

from dsdm_jax.core import storage
from dsdm_jax.core.stage import Context
from dsdm_jax.report import explorer, figures, formatting, page, report_data, tables


def run(context: Context) -> dict:
  """Writes `index.html` (one file that needs no other), `figures/*.png`, `data/*.csv` and `result.svg`."""
  from dsdm_jax.data.pool.pool import Pool

  options = context.config.report
  settings = {key: value for artifact in context.inputs.values() for key, value in artifact.config.items()}
  shown = report_data.load(context.inputs, settings, Pool(context.inputs['pool']).text)
  packed = explorer.pack(shown, options.explorer_rows, options.explorer_bytes)
  drawings = page.report_figures(shown)
  storage.write_text(context.out / 'index.html', page.render(shown, drawings, packed, options.examples))
  for name, drawing in drawings.items():
    storage.write_bytes(context.out / 'figures' / f'{name}.png', drawing.png())
  for name, content in tables.csv_files(shown, packed.row_N):
    storage.write_text(context.out / 'data' / name, content)
  choices = formatting.of_choices(shown.results, shown.results['accuracy_comparisons'])
  result = figures.forest_standalone(shown.results['comparisons'], shown.results['confidence'], 'random', choices)
  storage.write_text(context.out / 'result.svg', result)
  context.log.describe(f'page of {len(packed.row_N):,} rows')
  return {'page': 'index.html', 'picture': 'result.svg', 'rows': len(packed.row_N), 'characters': packed.characters}
