"""The finished run and its copies are those of the pipeline's tests."""

from tests.pipeline.conftest import copied, finished

__all__ = ['copied', 'finished']
