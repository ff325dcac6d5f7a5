"""Which implementation is taken, and what is said about it."""

import pytest
import torch
from interpreter import DEVICE, launchers

import sparseout
from sparseout._utils import torch_internals
from sparseout.kernels import backends, cpu, ops


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU on which the kernel runs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backends, "_launchers", lambda: "launchers")
    monkeypatch.setattr(backends, "_obstacle", lambda index: "")
    return monkeypatch


@pytest.mark.parametrize("setting", ["auto", "torch", "triton", "native", None])
@pytest.mark.parametrize("obstacle", ["", "the native kernel is not there"])
def test_where_there_is_no_gpu_it_is_the_native_kernel_or_torch(monkeypatch, setting, obstacle):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cpu, "obstacle", lambda: obstacle)
    if setting is None:
        monkeypatch.delenv("SPARSEOUT_BACKEND", raising=False)
    else:
        monkeypatch.setenv("SPARSEOUT_BACKEND", setting)
    device = torch.device("cpu")
    if setting == "native" and obstacle:
        for ask in (sparseout.backend, backends.kernels):
            with pytest.raises(RuntimeError, match=f"SPARSEOUT_BACKEND=native cannot be followed: {obstacle}"):
                ask(device)
    else:
        name = "torch" if setting == "torch" or obstacle else "native"
        reason = "SPARSEOUT_BACKEND=torch" if setting == "torch" else obstacle or cpu.threads()
        assert sparseout.backend() == sparseout.backend("cpu") == (name, reason)
        assert backends.kernels(device) is (cpu if name == "native" else None)
    assert sparseout.backend("cuda") == sparseout.backend(0) == ("torch", "there is no CUDA device")
    assert sparseout.backend(torch.device("mps")).name == "torch"
    assert backends.kernels(torch.device("meta")) is None


@pytest.mark.parametrize(("address", "words"), [(7, "in torch's threads"), (None, "in one thread: torch 2.8.0 ")])
def test_it_says_whose_threads_are_used(monkeypatch, address, words):
    monkeypatch.setattr(torch_internals, "parallel_for", lambda: address)
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    assert words in cpu.threads.__wrapped__()


def test_the_setting_decides_on_a_gpu(gpu):
    for setting, name in (("auto", "triton"), ("triton", "triton"), ("torch", "torch")):
        gpu.setenv("SPARSEOUT_BACKEND", setting)
        assert sparseout.backend().name == name
        assert (backends.kernels(torch.device("cuda")) is None) == (name == "torch")
    gpu.setattr(backends, "_obstacle", lambda index: f"device {index} is too old")
    gpu.setattr(torch.cuda, "current_device", lambda: 2)
    gpu.setenv("SPARSEOUT_BACKEND", "auto")
    assert sparseout.backend("cuda:3") == sparseout.backend(3) == ("torch", "device 3 is too old")
    assert sparseout.backend() == sparseout.backend("cuda") == ("torch", "device 2 is too old")
    gpu.setenv("SPARSEOUT_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="SPARSEOUT_BACKEND=triton cannot be followed: device 3 is too old"):
        sparseout.backend("cuda:3")


@pytest.mark.parametrize("device", ["cpu", "cuda", None])
def test_a_setting_that_is_none_of_them_is_refused(gpu, device):
    gpu.setenv("SPARSEOUT_BACKEND", "cuda")
    sentence = "expected `SPARSEOUT_BACKEND` to be 'auto', 'torch', 'triton' or 'native', but got 'cuda'"
    with pytest.raises(ValueError, match=sentence):
        sparseout.backend(device)


def test_every_obstacle_is_named(gpu):
    gpu.undo()
    gpu.setattr(torch.version, "hip", "6.0")
    assert "AMD" in backends._obstacle.__wrapped__(0)
    gpu.setattr(torch.version, "hip", None)
    gpu.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "needs compute capability 8.0, and this GPU has 7.5" in backends._obstacle.__wrapped__(0)
    for capability in ((8, 0), (9, 0)):
        gpu.setattr(torch.cuda, "get_device_capability", lambda index, found=capability: found)
        assert "capability" not in backends._obstacle.__wrapped__(0)

    def fails(error):
        def launchers():
            raise error

        return launchers

    gpu.setattr(backends, "_launchers", fails(ImportError("No module named 'triton'")))
    assert backends._obstacle.__wrapped__(0) == "triton cannot be imported: No module named 'triton'"
    gpu.setattr(backends, "_launchers", fails(RuntimeError("no C compiler")))
    assert backends._obstacle.__wrapped__(0) == "triton does not run here: no C compiler"


def test_nothing_is_no_setting_and_a_device_is_a_device(gpu):
    gpu.setenv("SPARSEOUT_BACKEND", "")
    assert sparseout.backend("cuda").name == "triton"
    for device in ("bogus", 1.5):
        with pytest.raises(ValueError, match=r"expected `device` to be one that torch\.device takes, but got"):
            sparseout.backend(device)


def test_the_launchers_are_there():
    pytest.importorskip("triton")
    assert callable(backends._launchers.__wrapped__().launch)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on which Triton's interpreter computes
@pytest.mark.parametrize("shared_dims", [(), (0,)])
@pytest.mark.parametrize("scale", [None, 0.5, "matched"])
@pytest.mark.parametrize("q", [0.5, 1.5, torch.tensor(1.3)])
@pytest.mark.parametrize("gradient", ["detached", "exact"])
def test_the_ops_hand_the_kernel_what_it_needs(monkeypatch, gradient, q, scale, shared_dims):
    pytest.importorskip("triton")
    x = torch.randn(6, 8, 5, device=DEVICE).relu()
    calls = []

    def result():
        leaf = x.clone().requires_grad_()
        y = sparseout.sparseout(leaf, 0.3, q, gradient=gradient, scale=scale, shared_dims=shared_dims, seed=3)
        return y.detach(), torch.autograd.grad(y.sin().sum(), leaf)[0]

    with launchers() as module:
        monkeypatch.setattr(ops, "_is_slope_finite", lambda *_: False)
        monkeypatch.setattr(backends, "kernels", lambda device: None)
        plain = result()
        launch = module.launch
        monkeypatch.setattr(module, "launch", lambda *given: calls.append(given) or launch(*given))
        monkeypatch.setattr(backends, "kernels", lambda device: module)
        fused = result()
    assert len(calls) == 2
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "dims"), [(torch.float64, ()), (torch.float32, (0, 2, 4))])
def test_what_the_kernel_does_not_do_goes_to_plain_torch(monkeypatch, dtype, dims):
    pytest.importorskip("triton")
    x = torch.randn(2, 3, 2, 3, 2, 3, dtype=dtype, device=DEVICE, requires_grad=True)
    expected = sparseout.sparseout(x, 0.3, 1.5, gradient="exact", shared_dims=dims, seed=3)
    with launchers() as module:
        monkeypatch.setattr(ops, "_is_slope_finite", lambda *_: False)
        monkeypatch.setattr(backends, "kernels", lambda device: module)
        y = sparseout.sparseout(x, 0.3, 1.5, gradient="exact", shared_dims=dims, seed=3)
        (ours,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), x)[0])
