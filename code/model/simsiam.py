"""SimSiam (arXiv 2011.10566, figure 1 and section 3): backbone, projector, predictor."""

from torch import nn

from model.backbone import make_backbone


class SimSiam(nn.Module):
    """Backbone, projector and predictor. Backbone and projector together are the paper's encoder f; the predictor is h.

    args: any object with the attributes backbone, stem, image_size, num_channels, zero_init, proj_layers, proj_dim,
    pred_dim, proj_bn and predictor of config.Config. has_heads: False if the weights are of a backbone without
    projector and predictor. Raises ValueError for an invalid backbone (make_backbone).
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

    def forward(self, *views, with_features=False):
        """views: two or more tensors, N x C x S x S. Returns p1, p2, ..., z1, z2, ..., each N x proj_dim;
        with_features: also the features of the backbone, f1, f2, ..., each N x d.

        Each view has its own forward pass: in a joint one BN would compute its statistics over both views.
        """
        features = [self.backbone(view) for view in views]
        z = [self.projector(each) for each in features]
        return *(self.predictor(each) for each in z), *z, *(features if with_features else ())

    def freeze_bn(self):
        """Keep the BN layers of the backbone in eval mode, also in training: their running statistics do not change."""
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
    """Build the projector: `num_layers` linear layers, each with BN, and ReLU on all but the last. The last BN has no
    scale and shift (official release).

    The release has a frozen bias in the last layer. Before a BN a constant bias has no effect, so there is none here.
    bn: see config.Config.proj_bn; layers without BN have a bias.
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
    """Build the predictor: two linear layers with BN and ReLU between them. The output has a bias and, except with
    bn='all', no BN."""
    modules = [nn.Linear(out_dim, hidden, bias=bn == 'none')]  # the following BN has a shift
    if bn != 'none':
        modules.append(nn.BatchNorm1d(hidden))
    modules += [nn.ReLU(inplace=True), nn.Linear(hidden, out_dim, bias=bn != 'all')]
    if bn == 'all':
        modules.append(nn.BatchNorm1d(out_dim))
    return nn.Sequential(*modules)
