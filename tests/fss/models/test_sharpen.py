from __future__ import annotations

import numpy as np
import torch

from fss.models.sharpen import box_mean, guided_filter, sharpen


def maps(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_box_means_are_those_of_windows_cut_off_at_the_border():
    x = maps(2, 1, 7, 9)
    for radius in (1, 3, 20):
        found = box_mean(x, radius)
        for i, j in ((0, 0), (3, 4), (6, 8), (2, 8)):
            window = x[
                ..., max(0, i - radius) : i + radius + 1, max(0, j - radius) : j + radius + 1
            ]
            torch.testing.assert_close(found[..., i, j], window.mean((-2, -1)))


def test_coefficients_are_those_of_ridge_regression_in_every_window():
    """He et al. 2013, equations 4, 19 and 20, window by window."""
    picture, x, radius, smoothness = maps(1, 3, 8, 9), maps(1, 1, 8, 9), 2, 1e-2
    a, b = np.zeros((8, 9, 3)), np.zeros((8, 9))
    for i in range(8):
        for j in range(9):
            rows, columns = slice(max(0, i - radius), i + 3), slice(max(0, j - radius), j + 3)
            colors = picture[0, :, rows, columns].flatten(1).numpy()
            values = x[0, 0, rows, columns].flatten().numpy()
            covariance = np.cov(colors, bias=True) + smoothness * np.eye(3)
            a[i, j] = np.linalg.solve(
                covariance, (colors * values).mean(1) - colors.mean(1) * values.mean()
            )
            b[i, j] = values.mean() - a[i, j] @ colors.mean(1)
    found_a, found_b = guided_filter(x, picture, radius, smoothness)
    expected = box_mean(torch.from_numpy(a).permute(2, 0, 1)[None], radius)
    torch.testing.assert_close(found_a, expected)
    torch.testing.assert_close(found_b[0, 0], box_mean(torch.from_numpy(b), radius))


def test_an_edge_of_the_picture_becomes_one_of_the_map():
    picture = torch.zeros(1, 3, 40, 40)
    picture[:, :, :, 20:] = 1
    blurred = torch.linspace(-1, 1, 40).expand(1, 1, 40, 40)
    a, b = guided_filter(blurred, picture, 8)
    sharp = ((a * picture).sum(1, keepdim=True) + b)[0, 0, 20]
    assert sharp[20] - sharp[19] > 5 * (blurred[0, 0, 0, 20] - blurred[0, 0, 0, 19])


def test_a_plain_picture_smooths_and_keeps_a_constant():
    plain = torch.full((1, 3, 20, 20), 0.3)
    a, b = guided_filter(torch.full((1, 1, 20, 20), 2.0), plain, 4)
    torch.testing.assert_close(
        (a * plain).sum(1, keepdim=True) + b, torch.full((1, 1, 20, 20), 2.0)
    )


def test_enlarged_maps_follow_the_edges_of_the_large_picture():
    picture = np.zeros((120, 160, 3), np.uint8)
    picture[:, 83:] = (255, 128, 0)  # between two pixels of the small one
    small = torch.zeros(1, 3, 30, 40)
    small[:, 0, :, 21:], small[:, 1, :, 21:] = 1, 0.5
    truth = torch.where(small[:, :1] > 0.5, 1.0, -1.0)
    found = sharpen(truth, small, torch.from_numpy(picture))[0, 0]
    assert found.shape == (120, 160)
    inside = torch.from_numpy(picture[..., 0] > 0)
    assert ((found > 0) == inside).float().mean() > 0.999
