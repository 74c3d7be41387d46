"""JPEG and PNG decoders that return tensors: torchvision's, or torchcodec's in versions where torchvision has none.

decode_jpeg(data): 3 x H x W uint8 RGB. decode_png(data): C x H x W, uint8 or uint16, as in the file. data: the bytes of
the file as a uint8 tensor. Both are None if neither package has them; Pillow then decodes JPEGs, to the same pixels,
and takes a third longer.
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

    except (ImportError, OSError, RuntimeError):  # not installed, or for another version of torch
        decode_jpeg = decode_png = None
