import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from dinotok.lpips import LPIPS
from tests.conftest import random_pixels

NETS = ("vgg", "alex", "squeeze")


def make_pair(height: int = 40, width: int = 56, batch_size: int = 2, noise: float = 0.3):
    target = random_pixels(batch_size, 3, height, width)
    generator = torch.Generator().manual_seed(1)
    return (target + noise * torch.randn(target.shape, generator=generator)).clamp(-1, 1), target


def random_lpips(net: str = "squeeze", seed: int = 0) -> LPIPS:
    """An LPIPS whose linear layers are not negative, as in the trained ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LPIPS(net)
    for name, parameter in model.named_parameters():
        if name.startswith("lin"):
            parameter.abs_()
        elif parameter.ndim == 4:
            parameter.mul_(2)  # so that deep activations are not all biases
    return model


class Recomputation:
    """LPIPS from its state dict and the formulas of the published code alone, with nothing of our modules."""

    def __init__(self, model: LPIPS):
        self.weights = model.state_dict()
        self.layers = {"vgg": self.vgg, "alex": self.alex, "squeeze": self.squeeze}[model.net]

    def convolve(self, hidden, name, **arguments):
        weight, bias = self.weights[f"features.{name}.weight"], self.weights[f"features.{name}.bias"]
        return F.conv2d(hidden, weight, bias, **arguments).clamp(min=0)

    def vgg(self, hidden):
        for stage in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
            hidden = F.max_pool2d(hidden, 2, 2) if stage[0] else hidden
            for index in stage:
                hidden = self.convolve(hidden, index, padding=1)
            yield hidden

    def alex(self, hidden):
        hidden = self.convolve(hidden, 0, stride=4, padding=2)
        yield hidden
        for index in (3, 6, 8, 10):
            hidden = F.max_pool2d(hidden, 3, 2) if index in (3, 6) else hidden
            hidden = self.convolve(hidden, index, padding=2 if index == 3 else 1)
            yield hidden

    def squeeze(self, hidden):
        hidden = self.convolve(hidden, 0, stride=2)
        yield hidden
        for stage in ((3, 4), (6, 7), (9,), (10,), (11,), (12,)):
            hidden = F.max_pool2d(hidden, 3, 2, ceil_mode=True) if stage[0] in (3, 6, 9) else hidden
            for index in stage:
                squeezed = self.convolve(hidden, f"{index}.squeeze")
                hidden = torch.cat(
                    [self.convolve(squeezed, f"{index}.expand{k}x{k}", padding=k // 2) for k in (1, 3)], dim=1
                )
            yield hidden

    def __call__(self, pixels, target):
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        inputs = [(p - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1) for p in (pixels, target)]
        distance = torch.zeros(len(pixels))
        for index, pair in enumerate(zip(*map(self.layers, inputs), strict=True)):
            one, other = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in pair)
            distance += ((one - other) ** 2 * self.weights[f"lin{index}.weight"]).sum(1).mean((1, 2))
        return distance


@pytest.mark.parametrize("net", NETS)
def test_it_equals_the_published_formulas(net):
    model, pair = random_lpips(net), make_pair()
    expected = Recomputation(model)(*pair)
    assert expected.min() > 1e-3
    torch.testing.assert_close(model(*pair), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("net", NETS)
def test_it_is_zero_for_equal_pictures_symmetric_and_per_picture(net):
    model, (pixels, target) = random_lpips(net), make_pair(33, 35)
    assert model(target, target).tolist() == [0, 0]
    distance = model(pixels, target)
    assert distance.shape == (2,)
    torch.testing.assert_close(model(target, pixels), distance)
    torch.testing.assert_close(
        torch.cat([model(p[None], t[None]) for p, t in zip(pixels, target, strict=True)]), distance
    )


@pytest.mark.parametrize("net", NETS)
def test_gradients_reach_the_pixels_and_nothing_else(net):
    model, (pixels, target) = random_lpips(net), make_pair()
    pixels.requires_grad_()
    model(pixels, target).sum().backward()
    assert pixels.grad.isfinite().all()
    assert pixels.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    assert not any(p.requires_grad for p in model.parameters())
    assert not model(pixels.detach(), target).requires_grad


@pytest.mark.parametrize("net", NETS)
def test_gradients_are_finite_where_nothing_is_active(net):
    model = random_lpips(net)
    for parameter in model.features.parameters():
        if parameter.ndim == 1:
            parameter.fill_(-100)  # every activation is zero, so every norm is
    pixels, target = make_pair()
    model(pixels.requires_grad_(), target).sum().backward()
    assert pixels.grad.tolist() == torch.zeros_like(pixels).tolist()


@pytest.mark.parametrize("net", NETS)
def test_faint_activations_count_as_much_as_strong_ones(net):
    # Without biases every activation is proportional to the first layer's weight, and only directions are compared.
    model, pair = random_lpips(net), make_pair()
    for parameter in model.features.parameters():
        if parameter.ndim == 1:
            parameter.zero_()
    expected = model(*pair)
    model.features[0].weight.mul_(1e-5)
    torch.testing.assert_close(model(*pair), expected, rtol=1e-3, atol=0)


def test_gradients_agree_with_finite_differences():
    model = random_lpips("squeeze").double()
    pixels, target = (p.double() for p in make_pair(17, 19, batch_size=1))
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(2)).double()
    (gradient,) = torch.autograd.grad(model(pixels.requires_grad_(), target), pixels)
    with torch.no_grad():
        difference = model(pixels + 1e-6 * direction, target) - model(pixels - 1e-6 * direction, target)
    assert (gradient * direction).sum().item() == pytest.approx(difference.item() / 2e-6, rel=1e-4)


def test_autocast_does_not_reach_in():
    model, (pixels, target) = random_lpips(), make_pair()
    expected = model(pixels, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(pixels, target), expected)
        distance = model(pixels.bfloat16(), target.bfloat16())
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, expected, rtol=0.05, atol=0)  # only the pixels were rounded


def test_it_never_trains():
    model = random_lpips().train()
    assert not any(module.training for module in model.modules())
    nn.ModuleList([model]).train()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("net", NETS)
def test_every_size_from_the_smallest_on_works(net):
    model = random_lpips(net)
    size = model.min_size
    assert model(*make_pair(size, size + 4)).isfinite().all()
    for height, width in ((size - 1, 64), (64, size - 1)):
        with pytest.raises(ValueError, match=f"{height}x{width} is below {size}.*'{net}'"):
            model(*make_pair(height, width))


def test_wrong_shapes_are_named():
    model = random_lpips()
    with pytest.raises(ValueError, match=r"\(1, 3, 20, 24\).*\(1, 3, 24, 20\) differ"):
        model(torch.zeros(1, 3, 20, 24), torch.zeros(1, 3, 24, 20))
    with pytest.raises(ValueError, match=r"\(1, 1, 20, 24\); expected"):
        model(torch.zeros(1, 1, 20, 24), torch.zeros(1, 1, 20, 24))
    with pytest.raises(ValueError, match="net='vgg19' is not one of vgg, alex, squeeze"):
        LPIPS("vgg19")


# Files


@pytest.mark.parametrize("net", NETS)
def test_a_file_gives_the_same_network_and_takes_no_random_numbers(tmp_path, net):
    model, pair = random_lpips(net), make_pair()
    model.save_file(tmp_path / f"lpips_{net}.safetensors")
    state = torch.get_rng_state()
    loaded = LPIPS.from_file(tmp_path / f"lpips_{net}.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.net == net
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(*pair), model(*pair))
    assert torch.equal(LPIPS.from_pretrained(tmp_path, net)(*pair), model(*pair))
    assert [path.name for path in tmp_path.iterdir()] == [f"lpips_{net}.safetensors"]


@pytest.mark.parametrize("net", NETS)
def test_without_metadata_the_names_of_the_tensors_tell_the_net(tmp_path, net):
    weights = {name: values.half() for name, values in random_lpips(net).state_dict().items()}
    save_file(weights, tmp_path / "weights.safetensors")
    loaded = LPIPS.from_file(tmp_path / "weights.safetensors")
    assert loaded.net == net
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_the_original_gives_the_same_network():
    # The module tree of `lpips.LPIPS(net="squeeze")`: slices that keep torchvision's numbers, dropout before linear.
    model, pair = random_lpips("squeeze"), make_pair()
    original = nn.Module()
    original.scaling_layer = nn.Module()
    original.scaling_layer.register_buffer("shift", model.shift)
    slices = {1: range(0, 2), 2: range(2, 5), 3: range(5, 8), 4: range(8, 10), 5: [10], 6: [11], 7: [12]}
    original.net = nn.ModuleDict(
        {f"slice{k}": nn.ModuleDict({str(i): model.features[i] for i in indices}) for k, indices in slices.items()}
    )
    linear = [nn.ModuleDict({"model": nn.Sequential(nn.Dropout(), getattr(model, f"lin{j}"))}) for j in range(7)]
    for index, layer in enumerate(linear):
        original.add_module(f"lin{index}", layer)
    original.lins = nn.ModuleList(linear)
    copy = LPIPS.from_original(original)
    assert copy.net == "squeeze"
    assert torch.equal(copy(*pair), model(*pair))
    model.lin0.weight.zero_()
    assert copy.lin0.weight.abs().min() > 0
    with pytest.raises(ValueError, match="'Module' has 0 tensors, not those of LPIPS"):
        LPIPS.from_original(nn.Module())


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "lpips_alex.safetensors"
    random_lpips("alex").save_file(path)
    with pytest.raises(
        ValueError, match="missing .first 'features.10.expand1x1.bias'. and 8 unexpected .first 'features.10.bias'"
    ):
        LPIPS.from_file(path, net="squeeze")
    weights = random_lpips("alex").state_dict()
    for name, values, message in (
        ("lin2.weight", torch.zeros(1, 4, 1, 1), r"'lin2.weight'.*\(1, 4, 1, 1\); expected \(1, 384, 1, 1\)"),
        ("lin2.weight", torch.full((1, 384, 1, 1), torch.nan), "'lin2.weight'.*NaN"),
        ("classifier.1.weight", torch.zeros(1), "has 16 tensors, not those of LPIPS"),
    ):
        save_file({**weights, name: values}, path)
        with pytest.raises(ValueError, match=message):
            LPIPS.from_file(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        LPIPS.from_file(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        LPIPS.from_file(tmp_path / "absent.safetensors")


def test_a_folder_without_the_net_or_with_two_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no \*alex\*.safetensors"):
        LPIPS.from_pretrained(tmp_path, "alex")
    model = random_lpips("alex")
    model.save_file(tmp_path / "alex_one.safetensors")
    model.save_file(tmp_path / "alex_two.safetensors")
    with pytest.raises(ValueError, match="several files for net='alex'"):
        LPIPS.from_pretrained(tmp_path, "alex")
    assert LPIPS.from_pretrained(tmp_path / "alex_two.safetensors", "alex").net == "alex"
    with pytest.raises(ValueError, match="revision='main' is for repositories"):
        LPIPS.from_pretrained(tmp_path, "alex", revision="main")
    with pytest.raises(OSError, match="no name of a repository"):
        LPIPS.from_pretrained("not//a name", "alex")


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """The cache of a machine without a network: one commit of `someone/lpips` is in it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot, commit = tmp_path / "models--someone--lpips", "0123456789" * 4
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text(commit)
    return snapshot / "snapshots" / commit


def test_a_repository_is_read_from_the_cache(offline_hub):
    model, pair = random_lpips("alex"), make_pair()
    model.save_file(offline_hub / "lpips_alex.safetensors")
    assert torch.equal(LPIPS.from_pretrained("someone/lpips", "alex")(*pair), model(*pair))
    with pytest.raises(FileNotFoundError, match=r"'someone/lpips' has no \*vgg\*.safetensors"):
        LPIPS.from_pretrained("someone/lpips")
    with pytest.raises(OSError, match="'someone/other' at revision 'v2' is not on this machine and cannot be had"):
        LPIPS.from_pretrained("someone/other", revision="v2")


# Real weights


@pytest.mark.data
@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_trained_weights_give_what_the_published_formulas_do_and_order_distortions(data_folder, net):
    model = LPIPS.from_pretrained(data_folder / "weights", net)
    assert model.net == net
    distances = []
    for noise in (0.02, 0.1, 0.5):
        pair = make_pair(64, 80, noise=noise)
        distances.append(model(*pair))
        torch.testing.assert_close(distances[-1], Recomputation(model)(*pair), rtol=1e-4, atol=1e-6)
    assert (distances[0] < distances[1]).all() and (distances[1] < distances[2]).all()
    assert min(float(getattr(model, f"lin{j}").weight.min()) for j in range(5)) >= 0
