"""SimSiam (arXiv 2011.10566, figure 1 and section 3): backbone, projector, predictor."""

from torch import nn

from model.backbone import make_backbone


class SimSiam(nn.Module):
    """backbone f, projector (with f: the paper's encoder) and predictor h.

    args: anything with the attributes backbone, stem, image_size, num_channels, zero_init, proj_layers, proj_dim,
    pred_dim, proj_bn and predictor of config.Config. Raises ValueError where there is no such backbone (make_backbone).
    has_heads: whether projector and predictor belong to the backbone; with weights of other tools there may be none
    that do.
    """

    has_heads = True

    def __init__(self, args):
        super().__init__()
        self.frozen = []  # BN layers that stay in eval mode (freeze_bn)
        self.backbone, features = make_backbone(
            args.backbone, args.stem, args.image_size, args.zero_init, args.num_channels
        )
        self.projector = make_projector(features, args.proj_layers, args.proj_dim, args.proj_bn)
        self.predictor = make_predictor(args.proj_dim, args.pred_dim, args.proj_bn)
        if args.predictor == 'none':
            self.predictor = nn.Identity()
        self.predictor.requires_grad_(args.predictor == 'mlp')

    def forward(self, *views):
        """views: two (or more), N x 3 x S x S each. Returns p1, p2, z1, z2 (p of each, then z), each N x proj_dim.

        Each view goes through alone: in one forward of both, the batch statistics of BN would mix the views.
        """
        z = [self.projector(self.backbone(view)) for view in views]
        return *(self.predictor(each) for each in z), *z

    def freeze_bn(self):
        """Keep the running statistics of the backbone's BN as they are: it stays in eval mode in training, too."""
        kinds = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
        self.frozen = [module for module in self.backbone.modules() if isinstance(module, kinds)]
        for norm in self.frozen:
            norm.eval()

    def train(self, mode=True):
        super().train(mode)
        for norm in self.frozen:
            norm.eval()
        return self


def make_projector(features, num_layers, out_dim, bn='default'):
    """`num_layers` fully connected layers, BN on each, ReLU on all but the last, whose BN has no affine (official
    release).

    The release keeps the last layer's bias frozen; before a BN a constant bias changes nothing, so there is none.
    bn: of config.Config.proj_bn; a layer without BN has a bias.
    """
    modules = []
    for i in range(num_layers):
        last = i == num_layers - 1
        has_bn = bn in ('default', 'all') or (bn == 'hidden' and not last)
        modules.append(nn.Linear(features if i == 0 else out_dim, out_dim, bias=not has_bn))
        if has_bn:
            modules.append(nn.BatchNorm1d(out_dim, affine=not last))
        if not last:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)


def make_predictor(out_dim, hidden, bn='default'):
    """Two fully connected layers, BN and ReLU between them; the output has a bias and (but for bn='all') no BN."""
    modules = [nn.Linear(out_dim, hidden, bias=bn == 'none')]  # a BN that follows has the bias
    if bn != 'none':
        modules.append(nn.BatchNorm1d(hidden))
    modules += [nn.ReLU(inplace=True), nn.Linear(hidden, out_dim, bias=bn != 'all')]
    if bn == 'all':
        modules.append(nn.BatchNorm1d(out_dim))
    return nn.Sequential(*modules)
