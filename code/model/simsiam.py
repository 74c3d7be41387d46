"""SimSiam (arXiv 2011.10566, figure 1 and section 3): backbone, projector, predictor."""

from torch import nn

from model.backbone import make_backbone


class SimSiam(nn.Module):
    """backbone f, projector (with f: the paper's encoder) and predictor h.

    args: anything with the attributes backbone, stem, proj_layers, proj_dim and pred_dim of config.Config.
    """

    def __init__(self, args):
        super().__init__()
        self.backbone, features = make_backbone(args.backbone, args.stem)
        self.projector = make_projector(features, args.proj_layers, args.proj_dim)
        self.predictor = nn.Sequential(
            nn.Linear(args.proj_dim, args.pred_dim, bias=False),  # BN follows and has the bias
            nn.BatchNorm1d(args.pred_dim),
            nn.ReLU(inplace=True),
            nn.Linear(args.pred_dim, args.proj_dim),
        )

    def forward(self, view1, view2):
        """view1, view2: N x 3 x S x S. Returns p1, p2, z1, z2, each N x proj_dim.

        Each view goes through alone: in one forward of both, the batch statistics of BN would mix the views.
        """
        z1 = self.projector(self.backbone(view1))
        z2 = self.projector(self.backbone(view2))
        return self.predictor(z1), self.predictor(z2), z1, z2


def make_projector(features, layers, width):
    """`layers` fully connected layers, BN on each, ReLU on all but the last, whose BN has no affine (official release).

    The release keeps the last layer's bias frozen; before a BN a constant bias changes nothing, so there is none.
    """
    modules = []
    for i in range(layers):
        last = i == layers - 1
        modules += [nn.Linear(features if i == 0 else width, width, bias=False), nn.BatchNorm1d(width, affine=not last)]
        if not last:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)
