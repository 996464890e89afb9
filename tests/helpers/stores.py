"""Object stores on loopback: an S3 (moto) and a Cloud Storage (gcp-storage-emulator), each a process of its own.

Both hold conditional writes to their condition: moto by itself, the emulator of Cloud Storage by what is added here.
They end with the process that started them, also when that is killed: each ends when its standard input does.
"""

import contextlib
import http
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

BUCKET = 'tests'
_S3 = {
  'AWS_ACCESS_KEY_ID': 'tests',
  'AWS_SECRET_ACCESS_KEY': 'tests',
  'AWS_DEFAULT_REGION': 'us-east-1',
  'AWS_EC2_METADATA_DISABLED': 'true',
}
# Without the first, gcsfs waits a minute for gRPC; without the last, epath asks TensorFlow, which knows no emulator.
_GS = {'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false', 'FSSPEC_GS_TOKEN': 'anon', 'EPATH_USE_TF': 'false'}


@contextlib.contextmanager
def serving(kind: str) -> Iterator[dict[str, str]]:
  """Starts a store with the bucket `BUCKET`; yields the environment in which programs reach it.

  Args:
    kind: 's3' or 'gs'.
  """
  server = subprocess.Popen(
    [sys.executable, '-m', 'tests.helpers.stores', kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  )
  assert server.stdin is not None and server.stdout is not None
  try:
    address = server.stdout.readline().strip()
    assert address.startswith('http://127.0.0.1:'), f'the emulator of {kind} did not start'
    if kind == 's3':
      yield {**_S3, 'AWS_ENDPOINT_URL': address}
    else:
      names = ('STORAGE_EMULATOR_HOST', 'TENSORSTORE_GCS_HTTP_URL', 'CLOUD_STORAGE_EMULATOR_ENDPOINT')
      yield {**_GS, **dict.fromkeys(names, address)}
  finally:
    server.stdin.close()
    server.wait(30)
    server.stdout.close()


def _serve(kind: str) -> None:
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # a line for each request
  if kind == 's3':
    os.environ |= _S3
    import boto3
    from moto.server import ThreadedMotoServer

    s3 = ThreadedMotoServer('127.0.0.1', 0, verbose=False)
    s3.start()
    address = f'http://127.0.0.1:{s3.get_host_and_port()[1]}'
    boto3.client('s3', endpoint_url=address).create_bucket(Bucket=BUCKET)
  else:
    from gcp_storage_emulator.handlers import objects

    plain = objects.download

    def download(request: Any, response: Any, storage: Any, *arguments: Any, **options: Any) -> None:
      # Cloud Storage says which generation it sends, and TensorStore's OCDBT fails where it reads again without it.
      with contextlib.suppress(NotFound):
        stored = storage.get_file_obj(request.params['bucket_name'], request.params['object_id'])
        response['x-goog-generation'] = stored['generation']
      plain(request, response, storage, *arguments, **options)

    insert, one = objects.insert, threading.Lock()

    def insert_if(request: Any, response: Any, storage: Any, *arguments: Any, **options: Any) -> None:
      # As Cloud Storage: writes if the present generation is `ifGenerationMatch`, 0 if there is no such object.
      wanted = request.query.get('ifGenerationMatch')
      name = request.query['name'][0] if 'name' in request.query else request.data['meta']['name']
      with one:
        present = '0'
        with contextlib.suppress(NotFound):
          present = storage.get_file_obj(request.params['bucket_name'], name)['generation']
        if not wanted or wanted == [present]:
          insert(request, response, storage, *arguments, **options)
          return
      response.status = http.HTTPStatus.PRECONDITION_FAILED
      response.json(
        {'error': {'code': 412, 'message': 'At least one of the pre-conditions you specified did not hold.'}}
      )

    objects.download, objects.insert = download, insert_if
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.server import create_server  # which takes the handlers as they are now

    with socket.create_server(('127.0.0.1', 0)) as free:
      port = free.getsockname()[1]
    create_server('127.0.0.1', port, in_memory=True, default_bucket=BUCKET).start()
    address = f'http://127.0.0.1:{port}'
  sys.stdout.write(f'{address}\n')
  sys.stdout.flush()
  sys.stdin.read()
  os._exit(0)


if __name__ == '__main__':
  _serve(sys.argv[1])
