"""Stage `report`: the page to read, and the picture of the result for a README."""

from dsdm_jax.core import atomic
from dsdm_jax.core.config import flatten
from dsdm_jax.core.stage import Context
from dsdm_jax.report import evidence, figures, page


def run(context: Context) -> dict:
  """Leaves `index.html`, one file that needs no other, and `result.svg`; reads the stages in `evidence.STAGES`."""
  from dsdm_jax.data.pool import Pool

  shown = evidence.load(context.inputs, flatten(context.config), Pool(context.inputs['pool']).text)
  atomic.write_text(context.out / 'index.html', page.render(shown, context.config.report.examples))
  picture = figures.forest_standalone(shown.results['comparisons'], shown.results['confidence'], baseline='random')
  atomic.write_text(context.out / 'result.svg', picture)
  return {'page': 'index.html', 'picture': 'result.svg'}
