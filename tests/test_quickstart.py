import numpy as np
from PIL import Image

from dinotok.quickstart import AUTOENCODER, PHOTOGRAPHS, print_quickstart, run_quickstart


def test_quickstart_reconstructs_photographs_with_the_bundled_models(tmp_path, capsys):
    result = run_quickstart(tmp_path / "new" / "folder")
    assert [row["file"] for row in result.rows] == list(PHOTOGRAPHS)
    for row in result.rows:
        assert row["psnr"] > 26 and row["ssim"] > 0.8
        assert row["psnr"] - 2 > row["codes_psnr"] > 19
        assert row["latents"][1:] == row["indices"][1:] == (-(-row["height"] // 16), -(-row["width"] // 16))
        assert row["indices"][0] == 2 and 0.05 < row["bits_per_pixel"] < 0.15
    for path in result.files:
        with Image.open(path) as image:
            assert min(image.size) > 400 and np.asarray(image).std() > 20

    print_quickstart(result)
    printed = capsys.readouterr().out
    for text in (*PHOTOGRAPHS, f"{result.rows[0]['psnr']:.2f}", AUTOENCODER, *map(str, result.files)):
        assert text in printed
