"""One training step in double precision, alone or as one of several processes; test_distributed.py compares them.

python3 one_step.py FILE          or under torchrun: rank 0 writes its loss, gradients, BN statistics to FILE
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from model.simsiam import SimSiam  # noqa: E402
from optimizer.sgd import make_sgd, set_learning_rates  # noqa: E402
from runtime import distributed  # noqa: E402
from runtime.options import get_config  # noqa: E402
from train import train_step  # noqa: E402

if __name__ == '__main__':
    distributed.init_process_group(torch.device('cpu'))
    torch.manual_seed(0)
    model = SimSiam(get_config(preset='demo', proj_dim=12, pred_dim=5)).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    views = torch.randn(2, 3, 8, 3, 16, 16, dtype=torch.float64)
    each = 8 // distributed.world_size()
    mine = slice(distributed.rank() * each, (distributed.rank() + 1) * each)
    optimizer, net, losses = make_sgd(model, 0.9, 1e-3), distributed.wrap_ddp(model, torch.device('cpu')), []
    set_learning_rates(optimizer, 0.1, 0.1, 0.2)
    for view1, view2 in views.transpose(0, 1):
        loss, *_ = train_step(net, optimizer, (view1[mine], view2[mine]))
        losses.append(distributed.all_reduce_mean([loss.item()], loss.device)[0])
    if not distributed.rank():
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.save({'losses': losses, 'gradients': gradients, 'state': model.state_dict()}, sys.argv[1])
    distributed.destroy_process_group()
