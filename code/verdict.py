"""What the measures without labels are called, and what they say together of a network."""

# In front of people, in this order. n: images of the retrieval (protocols/spectrum.py).
MEASURES = {
    'rank': 'rank of the own other view, features',
    'rank_z': 'rank of the own other view, z',
    'retrieval': 'own other view is the nearest, features, %',
    'retrieval_z': 'own other view is the nearest, z, %',
    'rotation': 'rotations told apart, %',
    'rankme': 'RankMe',
    'area': 'area under the cumulative spectrum',
    'alpha': 'alpha-ReQ',
    'lidar': 'LiDAR, features',
    'lidar_z': 'LiDAR, z',
    'alignment': 'alignment',
    'uniformity': 'uniformity',
    'std': 'std of z',
    'mean_direction': 'norm of the mean direction of z',
    'correlation': 'correlation of channels of z',
    'rank_z_minus_p': 'effective rank of z minus that of p',
    'norm_z': 'norm of z',
    'norm_p': 'norm of p',
}
QUICK = ('rank', 'retrieval', 'rank_z', 'rankme', 'area', 'alpha')  # of each checkpoint of a run, in a line
FAVOURED = 'rank'
