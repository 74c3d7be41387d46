"""Reading of weight files: torch.save and safetensors, without executing code from them."""

import io
import pickle
import re
import warnings
import zipfile

import numpy as np
import torch

from runtime.checkpoints.format import is_ours
from runtime.environment import require_package
from runtime.errors import WorkError

# Packages whose objects (options, NumPy scalars) occur in harmless files beside the weights; loaded as InertStub.
INERT_PICKLE_PACKAGES = (
    'argparse',
    'numpy',
    'pathlib',
    'omegaconf',
    'typing',
    'collections',
    'enum',
    'pytorch_lightning',
    'lightning',
    'lightning_fabric',
    'easydict',
    'yacs',
    'ml_collections',
    'addict',
)
# Globals that reconstruct NumPy arrays, by their names in NumPy 1 and 2: some files store weights as arrays.
NUMPY_SAFE_GLOBALS = [
    *((np.empty(0).__reduce__()[0], f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(letter)) for letter in np.typecodes['All']),
]
# Other files than weights by their first bytes, and what helps.
OTHER_FORMATS = {
    b'version https://git-lfs': 'a pointer of Git LFS: download the file itself, with git lfs pull',
    b'\x89HDF': 'an HDF5 file, of Keras or TensorFlow: convert it',
    b'GGUF': 'a GGUF file: take the weights as safetensors',
    b'\x1f\x8b': 'compressed by gzip: unpack it',
    b'<': 'a web page: the download went wrong',
    b'{': 'JSON text, such as the index of several files',
}
DAMAGED = '{} is damaged or was not written by this project; take another checkpoint'


def load_file(path):
    """Load a file of torch.save or safetensors, on the CPU, without executing code from it. Raises WorkError."""
    if is_safetensors(path):
        reader = require_package('safetensors.torch', path.name)
        try:
            return reader.load_file(path)
        except Exception as error:  # SafetensorError and OSError
            raise WorkError(f'{DAMAGED.format(path)} ({error})') from None
    inert = []
    while True:
        try:
            with (
                torch.serialization.safe_globals([*NUMPY_SAFE_GLOBALS, *((InertStub, name) for name in inert)]),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter('ignore')  # TorchScript and old pickles: the error below is enough
                # torch.load takes a path with this ending for a file of safetensors.
                source = io.BytesIO(path.read_bytes()) if path.suffix == '.safetensors' else path
                return torch.load(source, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError as error:
            refused = re.search(r'GLOBAL ([\w.]+)', str(error))
            if not refused:
                raise WorkError(describe_unreadable(path)) from None
            if refused[1].split('.')[0] not in INERT_PICKLE_PACKAGES or refused[1] in inert:
                raise WorkError(
                    f'{path} is not loaded: it would run {refused[1]}, and only tensors and plain values are read '
                    'from a checkpoint; of a whole network, save the state_dict()'
                ) from None
            inert.append(refused[1])
        except Exception:  # the unpickler raises various types on damaged files
            raise WorkError(describe_unreadable(path)) from None


def read_metadata(path):
    """Return the metadata of a file of safetensors, {name: text}; {} for other files."""
    if not is_safetensors(path):
        return {}
    with require_package('safetensors', path.name).safe_open(path, 'pt') as file:
        return file.metadata() or {}


def describe_unreadable(path):
    """Return the error message for a file that torch.load cannot read: what it is, by its first bytes, or damaged."""
    with open(path, 'rb') as file:
        head = file.read(64).lstrip()
    found = next((text for start, text in OTHER_FORMATS.items() if head.startswith(start)), '' if head else 'empty')
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile:
            return DAMAGED.format(path)
        if any(name.endswith('/constants.pkl') for name in names):
            found = 'a TorchScript program: torch.save(torch.jit.load(FILE).state_dict(), NEW) saves its weights'
        elif names and all(name.endswith('.npy') for name in names):
            found = (
                'a NumPy archive: save its arrays as a dict of tensors, under the names of the network, with torch.save'
            )
        elif not any(name.endswith('/data.pkl') for name in names):
            found = 'a ZIP archive: unpack it and name the file'
    elif path.suffix == '.onnx':
        found = 'an ONNX file: take the weights that it was made from'
    return (
        f'{path} holds no weights that PyTorch or safetensors can read: it is {found}'
        if found
        else DAMAGED.format(path)
    )


def is_safetensors(path):
    """Whether a file is in the format of safetensors: the length of a JSON header, and the header."""
    try:
        with open(path, 'rb') as file:
            return file.read(9)[8:] == b'{'
    except OSError as error:
        raise WorkError(f'{path} cannot be read: {error.strerror}') from None


def verify_crc(path):
    """Verify the checksums of a checkpoint, which torch does not. Raises WorkError if one is wrong."""
    try:
        with zipfile.ZipFile(path) as parts:
            wrong = parts.testzip()
    except zipfile.BadZipFile:
        return  # an old format without checksums, which torch can read
    if wrong:
        raise WorkError(f'{path} is damaged, in {wrong}: take another checkpoint')


class InertStub:
    """Replaces objects of other tools' settings in a file; it accepts any arguments and does nothing."""

    def __init__(self, *args, **more):
        pass

    def __setstate__(self, state):
        pass


def read_checkpoint(path):
    """Load a checkpoint of this project, of any format. Raises WorkError for other files."""
    content = load_file(path)
    if not is_ours(content):
        raise WorkError(DAMAGED.format(path))
    return content
