"""The pipeline's finished run is what the stage and the export are tested on."""

from tests.pipeline.conftest import finished

__all__ = ['finished']
