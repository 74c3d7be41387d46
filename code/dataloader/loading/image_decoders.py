"""JPEG and PNG decoders that give tensors: torchvision's, or torchcodec's where torchvision's are gone.

decode_jpeg(data): RGB, 3 x H x W uint8; decode_png(data): as the file has it, C x H x W, uint8 or uint16. data: the
bytes of a file, a tensor. Both are None where neither package has them: Pillow reads JPEGs too, and takes a third
longer. The pixels are the same.
"""

import warnings

try:  # torchvision 0.29 announces that its decoders will go
    from torchvision import io

    warnings.filterwarnings('ignore', message='The image decoding and encoding capabilities', module='torchvision.io')

    def decode_jpeg(data):
        return io.decode_jpeg(data, io.ImageReadMode.RGB)

    def decode_png(data):
        return io.decode_png(data, io.ImageReadMode.UNCHANGED)

    assert io.decode_jpeg
    assert io.decode_png
except (ImportError, AttributeError):
    try:
        from torchcodec import decoders

        def decode_jpeg(data):
            return decoders.decode_jpeg(data, mode='RGB')

        def decode_png(data):
            return decoders.decode_png(data, mode='UNCHANGED', output_dtype='auto')

    except (ImportError, OSError, RuntimeError):  # not there, or of another version of torch
        decode_jpeg = decode_png = None
