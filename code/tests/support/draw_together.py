"""torchrun tests/draw_together.py FOLDER: several processes want the demo set at once; each says whether it drew."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from dataloader import load_dataset
from dataloader.sources import demo
from runtime import distributed
from runtime.options import get_config

if __name__ == '__main__':
    demo.TRAIN_PER_CLASS, demo.VAL_PER_CLASS = 12, 3
    load_dataset.ROOT, drawn = Path(sys.argv[1]), []
    draw = demo.draw_pattern
    demo.draw_pattern = lambda *given: drawn.append(None) or draw(*given)
    distributed.init_process_group(torch.device('cpu'))
    folder = f'{sys.argv[1]}/data/demo'
    splits = load_dataset.load_splits(get_config(preset='demo', image_path=folder, cache_path=f'{sys.argv[1]}/cache'))
    print(f'rank {distributed.rank()}: drew {len(drawn)}, has {len(splits["train"])}', flush=True)
    distributed.destroy_process_group()
