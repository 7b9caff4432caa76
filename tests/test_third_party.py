"""Models as third parties write them: what a conversion keeps of each, or why it refuses."""

import collections
import copy
import dataclasses
import functools
import random
import sys
import threading
import types

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dysurgery
from dysurgery.errors import DysurgeryError, UsageError
from dysurgery.example import call_arguments, tensors
from dysurgery.nn import DynamicConv2d, DynamicLayer

IMAGE = torch.randn(2, 3, 8, 8, dtype=torch.float64)


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Net(nn.Module):
    """What the models below are made of: ``conv`` is what a conversion is to reach."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = conv(3, 4), conv(4, 4), nn.Linear(4, 2)
        self.double()

    def features(self, x):
        return torch.relu(self.conv(self.stem(x)))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def dynamic_paths(model):
    return [path for path, module in model.named_modules() if isinstance(module, DynamicLayer)]


def reasons(model, example=IMAGE):
    return {planned.site.path: planned.decision.reason for planned in dysurgery.plan(model, example).sites}


def assert_same(model, dynamic, example, modes=(False, True)):
    """Both give the same outputs, and change their buffers in the same way, in eval and in train mode."""
    args, kwargs = call_arguments(example)
    for mode in modes:
        outputs, states = [], []
        for network in (model, dynamic):
            network = copy.deepcopy(network).train(mode)
            torch.manual_seed(3)
            random.seed(3)
            numpy.random.seed(3)
            outputs.append(tensors(network(*args, **kwargs)))
            states.append({name: buffer for name, buffer in network.named_buffers() if not name.endswith(".tau")})
        assert outputs[0]
        torch.testing.assert_close(outputs[1], outputs[0])
        torch.testing.assert_close(states[1], states[0])


def converted(model, example=IMAGE, expect=("conv",), **options):
    """Convert, check that ``expect`` became dynamic, that the model is as it was, and that both do the same."""
    before = copy.deepcopy(model.state_dict())
    dynamic = dysurgery.convert(model, example, **options)
    assert dynamic_paths(dynamic) == list(expect)
    assert not dynamic_paths(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert_same(model, dynamic, example)
    return dynamic


# Hooks


def test_hooks_that_change_what_passes_are_kept_on_the_root_and_on_a_converted_layer():
    model = Net()
    model.register_forward_pre_hook(lambda module, args, kwargs: ((2 * args[0],), kwargs), with_kwargs=True)
    model.register_forward_hook(lambda module, args, kwargs, output: output + 1, with_kwargs=True)
    model.conv.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    model.conv.register_forward_hook(lambda module, args, output: output * output)
    converted(model)


@pytest.mark.parametrize("in_place", [False, True])
def test_every_kind_of_hook_on_a_converted_layer_is_called(in_place):
    model, log = Net(), []
    model.conv.register_forward_pre_hook(lambda module, args, kwargs: log.append("pre"), with_kwargs=True)
    model.conv.register_forward_hook(lambda module, args, output: log.append("after"), always_call=True)
    model.conv.register_full_backward_pre_hook(lambda module, gradients: log.append("backward pre"))
    model.conv.register_full_backward_hook(lambda module, inputs, outputs: log.append("backward"))
    dynamic = dysurgery.convert(model, IMAGE, in_place=in_place)
    log.clear()
    dynamic(IMAGE).sum().backward()
    assert log == ["pre", "after", "backward pre", "backward"]


def test_a_backward_hook_still_changes_the_gradient():
    model = Net()
    model.conv.register_full_backward_hook(lambda module, inputs, outputs: (2 * inputs[0],))
    dynamic = dysurgery.convert(model, IMAGE, start="zero-sum")
    for network in (model, dynamic):
        network(IMAGE).sum().backward()
    torch.testing.assert_close(dynamic.stem.weight.grad, model.stem.weight.grad)


def test_the_handle_of_a_hook_removes_it_after_a_conversion_in_place():
    model, log = Net(), []
    handle = model.conv.register_forward_hook(lambda module, args, output: log.append(1))
    dysurgery.convert(model, IMAGE, in_place=True)
    handle.remove()
    log.clear()
    model(IMAGE)
    assert not log


def test_a_hook_that_is_a_method_of_the_model_works_on_the_copy():
    class Remembers(Net):
        def __init__(self):
            super().__init__()
            self.seen = []
            self.conv.register_forward_hook(self.keep)

        def keep(self, module, args, output):
            self.seen.append(output)

        def forward(self, x):
            self.seen.clear()
            return super().forward(x), self.seen[0]

    converted(Remembers())


def test_a_convolution_whose_hook_reads_its_weight_stays_static():
    model = Net()
    model.conv.register_forward_hook(lambda module, args, output: output * module.weight.norm())
    assert reasons(model)["conv"] == "its weight or bias is read outside its own call"


# Signatures, inputs and outputs


class Optional(Net):
    def forward(self, x, *, mask=None, scale: float = 1.0, return_features=False):
        features = self.features(x)
        if mask is not None:
            features = features * mask
        y = self.head(features.mean((2, 3))) * scale
        return (y, features) if return_features else y


@pytest.mark.parametrize("given", ["x", "mask", "scale", "return_features"])
def test_arguments_that_the_example_leaves_out_or_gives_can_be_others_later(given):
    values = {"mask": (torch.rand(2, 1, 8, 8) > 0.5).double(), "scale": 3.0, "return_features": True}
    model = Optional()
    dynamic = converted(model, {"x": IMAGE} | {given: values.get(given, IMAGE)})
    for arguments in ({}, *({name: value} for name, value in values.items()), values):
        assert_same(model, dynamic, {"x": IMAGE, **arguments})


def test_a_forward_that_takes_anything():
    class Anything(Net):
        def forward(self, *args, **kwargs):
            return super().forward(args[0] if args else kwargs["image"]) * kwargs.get("scale", 1)

    converted(Anything())
    converted(Anything(), {"image": IMAGE, "scale": 2})


Nested = collections.namedtuple("Nested", "tensors mask")


@dataclasses.dataclass
class Samples:
    tensors: torch.Tensor


@pytest.mark.parametrize(
    ("unpack", "example"),
    [
        (lambda a, b: a + b, (IMAGE, 2 * IMAGE)),
        (lambda image, scale: image * scale, (IMAGE, 2.5)),
        (lambda images: torch.stack(images), ([IMAGE[0], IMAGE[1]],)),
        (lambda batch: batch["image"] * batch["meta"]["scale"], ({"image": IMAGE, "meta": {"scale": 3}},)),
        (lambda nested: nested.tensors, (Nested(IMAGE, None),)),
        (lambda samples: samples.tensors, (Samples(IMAGE),)),
    ],
    ids=["two images", "image and scalar", "list", "dict", "namedtuple", "object"],
)
def test_inputs_of_every_form(unpack, example):
    class Takes(Net):
        def forward(self, *args):
            return super().forward(unpack(*args))

    converted(Takes(), example)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    extra: dict


@dataclasses.dataclass(slots=True)
class Slotted:
    logits: torch.Tensor


class ModelOutput(collections.OrderedDict):
    """As in transformers: a dict whose keys are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


FORMS = {
    "nested": lambda y, x: {"a": y, "b": [x, {"c": (y,)}]},
    "dataclass": lambda y, x: Output(y, {"map": x}),
    "slots": lambda y, x: Slotted(y),
    "namedtuple": lambda y, x: Nested(y, x),
    "ModelOutput": lambda y, x: ModelOutput(logits=y, hidden=x),
    "not only tensors": lambda y, x: (y, None, 3, 2.5, "name", [None, True]),
    "object": lambda y, x: types.SimpleNamespace(logits=y),
    "classes": lambda y, x: y.argmax(1),
    "complex": lambda y, x: torch.fft.fft2(x),
    "sparse": lambda y, x: x.flatten(1).to_sparse(),
}


class Forms(Net):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        features = self.features(x)
        return FORMS[self.form](self.head(features.mean((2, 3))), features)


@pytest.mark.parametrize("form", FORMS)
def test_outputs_of_every_form_keep_it(form):
    model = Forms(form)
    dynamic = dysurgery.convert(model, IMAGE)
    assert dynamic_paths(dynamic) == ["conv"]
    found, expected = dynamic(IMAGE), model(IMAGE)
    assert type(found) is type(expected)
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", ["slots", "complex", "sparse"])
def test_a_wrong_result_is_noticed_in_every_form(form, monkeypatch):
    forward = DynamicConv2d.forward
    monkeypatch.setattr(DynamicConv2d, "forward", lambda self, x: 1.01 * forward(self, x))
    with pytest.raises(DysurgeryError, match="computes something else"):
        dysurgery.convert(Forms(form), IMAGE)


def test_a_wrong_imaginary_part_is_noticed(monkeypatch):
    class Imaginary(Net):
        def forward(self, x):
            x = self.stem(x)
            return torch.complex(x, self.conv(x))

    forward = DynamicConv2d.forward
    monkeypatch.setattr(DynamicConv2d, "forward", lambda self, x: 1.01 * forward(self, x))
    with pytest.raises(DysurgeryError, match="computes something else"):
        dysurgery.convert(Imaginary(), IMAGE)


@pytest.mark.parametrize("nothing", [None, 1.5])
def test_a_model_that_returns_no_tensor_is_refused(nothing):
    class Nothing(Net):
        def forward(self, x):
            super().forward(x)
            return nothing

    with pytest.raises(DysurgeryError, match=f"no tensor that could be compared .{type(nothing).__name__}"):
        dysurgery.convert(Nothing(), IMAGE)


# Autocast and checkpointing


class Mixed(Net):
    def __init__(self):
        super().__init__()
        self.exact = conv(4, 4)
        self.float()

    def forward(self, x):
        x = self.stem(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.conv(x)
        with torch.autocast("cpu", enabled=False):
            x = self.exact(x.float())
        return self.head(x.mean((2, 3)))


def test_autocast_regions_convert_and_train():
    model, x = Mixed(), IMAGE.float()
    dynamic = dysurgery.convert(model, x)
    assert dynamic_paths(dynamic) == ["conv", "exact"]
    torch.testing.assert_close(dynamic(x), model(x), rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # and inside one of the caller's
        assert dynamic_paths(dysurgery.convert(model, x)) == ["conv", "exact"]
        torch.testing.assert_close(dynamic(x), model(x), rtol=1e-2, atol=1e-2)
    dynamic.train()(x).sum().backward()
    for layer in (dynamic.conv, dynamic.exact):
        assert layer.bank.grad.dtype == torch.float32
        assert layer.bank.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("which", ["convolution", "block"])
def test_checkpointed_layers_get_the_gradient_that_the_static_ones_got(reentrant, which):
    class Checkpointed(Net):
        def forward(self, x):
            if which == "convolution":
                x = checkpoint(self.conv, self.stem(x), use_reentrant=reentrant)
            else:
                x = checkpoint(self.features, x, use_reentrant=reentrant)
            return self.head(x.mean((2, 3)))

    model = Checkpointed().train()
    dynamic = converted(model)
    x = IMAGE.clone().requires_grad_()
    for network in (model, dynamic):
        network(x).sum().backward()
    torch.testing.assert_close(dynamic.stem.weight.grad, model.stem.weight.grad)
    # The kernels are equal and the attention's weights sum to one, so the kernels' gradients sum to the static one.
    torch.testing.assert_close(dynamic.conv.bank.grad.sum(0), model.conv.weight.grad.flatten())


# Control flow and state


class Ways(Net):
    """Which of two convolutions runs depends on the shape, on the data or on the mode."""

    def __init__(self, what):
        super().__init__()
        self.what, self.yes, self.no = what, conv(4, 4), conv(4, 4)
        self.double()

    def forward(self, x):
        features = self.features(x)
        taken = {"shape": x.shape[-1] > 10, "data": x.mean() > 10, "mode": self.training}[self.what]
        return self.yes(features) if taken else self.no(features)


@pytest.mark.parametrize("what", ["shape", "data", "mode"])
def test_the_branch_that_the_example_does_not_take_stays_static_and_right(what):
    model = Ways(what)
    assert reasons(model)["yes"] == "not called on the example"
    dynamic = converted(model, expect=("conv", "no"))
    for other in (torch.randn(2, 3, 12, 12, dtype=torch.float64), IMAGE + 20):
        assert_same(model, dynamic, other)


def test_buffers_that_change_in_forward_are_left_as_they_were_and_go_on_changing():
    class Counts(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("step", torch.zeros((), dtype=torch.long))
            self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
            self.register_buffer("queue", torch.zeros(6, 4, dtype=torch.float64))
            self.calls = 0

        def forward(self, x):
            features = self.features(x).mean((2, 3))
            self.step += 1
            self.calls += 1
            self.mean = 0.9 * self.mean + 0.1 * features.detach().mean(0)
            self.queue = torch.cat([self.queue[2:], features.detach()])
            return features + self.mean + self.queue.sum(0)

    model = Counts()
    model(IMAGE)
    dynamic = converted(model)
    assert model.calls == dynamic.calls == model.step == dynamic.step == 1


def test_a_parameter_that_forward_writes_is_left_as_it_was():
    class Centred(Net):
        def __init__(self):
            super().__init__()
            self.center = nn.Parameter(torch.zeros(2, dtype=torch.float64), requires_grad=False)
            self.scale = nn.Parameter(torch.tensor(5.0, dtype=torch.float64))

        def forward(self, x):
            y = super().forward(x)
            self.center.mul_(0.9).add_(y.detach().mean(0))
            self.scale.data.clamp_(max=1.0)
            return (y - self.center) * self.scale

    model = Centred()
    dysurgery.cost(model, IMAGE)
    converted(model)
    assert model.scale == 5


def test_random_numbers_in_forward_are_the_same_and_the_generators_are_left_alone():
    class Noisy(Net):
        def forward(self, x):
            x = x + random.random() + numpy.random.rand() + torch.rand_like(x)
            return F.dropout(super().forward(x), 0.5, self.training)

    model = Noisy()
    states = torch.random.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    dynamic = dysurgery.convert(model, IMAGE)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert numpy.random.get_state()[1].tolist() == states[2]
    assert_same(model, dynamic, IMAGE)
    # A tracer would make a constant of what is no tensor's: there is no graph of such a model.
    assert type(dysurgery.convert(model, IMAGE, as_graph=True)) is Noisy


# Weights and modules that are shared, read or hidden


def test_a_weight_that_a_second_convolution_uses_stays_static():
    class Twice(Net):
        def __init__(self):
            super().__init__()
            self.other = conv(4, 4).double()

        def forward(self, x):
            x = self.other(self.conv(self.stem(x)))
            return F.conv2d(x, self.conv.weight, padding=1)

    assert reasons(Twice())["conv"] == "its weight or bias is read outside its own call"
    converted(Twice(), expect=("other",))


def test_a_weight_that_is_read_in_train_mode_alone_stays_static():
    class Regularised(Net):
        def forward(self, x):
            y = super().forward(x)
            return (y, self.conv.weight.norm()) if self.training else y

    assert reasons(Regularised())["conv"] == "its weight or bias is read outside its own call"


def test_a_penalty_on_all_parameters_is_refused_for_it_would_be_another():
    class Penalty(Net):
        def forward(self, x):
            return super().forward(x), sum(parameter.norm() for parameter in self.parameters())

    model = Penalty()
    with pytest.raises(DysurgeryError, match="computes something else"):
        dysurgery.convert(model, IMAGE)


def test_tied_weights_stay_static_and_tied():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.twin, self.other = conv(4, 4), conv(4, 4)
            self.double()
            self.twin.weight = self.conv.weight

        def forward(self, x):
            return self.other(self.twin(self.conv(self.stem(x))))

    dynamic = converted(Tied(), expect=("other",))
    assert dynamic.twin.weight is dynamic.conv.weight


@pytest.mark.parametrize("in_place", [False, True])
def test_a_module_under_two_names_called_twice_is_one_layer(in_place):
    class Again(Net):
        def __init__(self):
            super().__init__()
            self.again = self.conv

        def forward(self, x):
            return self.again(self.conv(self.stem(x)))

    model = Again()
    reference = copy.deepcopy(model)
    dynamic = dysurgery.convert(model, IMAGE, in_place=in_place)
    assert isinstance(dynamic.conv, DynamicLayer)
    assert dynamic.again is dynamic.conv
    assert_same(reference, dynamic, IMAGE)


def test_modules_in_plain_lists_and_dicts_stay_static_and_are_copied():
    class Hides(Net):
        def __init__(self):
            super().__init__()
            self.listed, self.named = [conv(4, 4).double()], {"a": conv(4, 4).double()}

        def forward(self, x):
            return self.named["a"](self.listed[0](self.conv(self.stem(x))))

    model = Hides()
    plan = dysurgery.plan(model, IMAGE)
    assert [planned.site.path for planned in plan.sites] == ["stem", "conv"]
    assert any("2 call(s)" in note for note in plan.graph.notes)
    dynamic = converted(model)
    assert type(dynamic.listed[0]) is nn.Conv2d
    assert dynamic.listed[0] is not model.listed[0]


def test_a_convolution_called_by_its_forward_stays_static():
    class Bound(Net):
        def __init__(self):
            super().__init__()
            self.other = conv(4, 4).double()
            self.op = self.conv.forward

        def forward(self, x):
            return self.other(self.op(self.stem(x)))

    assert reasons(Bound())["conv"] == "its weight or bias is read outside its own call"
    dynamic = converted(Bound(), expect=("other",))
    assert dynamic.op.__self__ is dynamic.conv


def test_a_partial_of_a_convolution_leads_to_its_layer():
    class Partial(Net):
        def __init__(self):
            super().__init__()
            self.op = functools.partial(self.conv)

        def forward(self, x):
            return self.op(self.stem(x))

    dynamic = converted(Partial())
    assert dynamic.op.func is dynamic.conv


def test_a_method_bound_to_the_instance_is_bound_to_the_copy():
    model = Net()
    model.forward = types.MethodType(lambda self, x: self.conv(self.stem(x)), model)
    dynamic = converted(model)
    assert dynamic.forward.__self__ is dynamic


def test_a_function_that_holds_the_original_is_refused():
    class Lambda(Net):
        def __init__(self):
            super().__init__()
            self.other = conv(4, 4).double()
            self.op = lambda x: self.conv(x)

        def forward(self, x):
            return self.other(self.op(self.stem(x)))

    wrapped = Net()
    inner = wrapped.forward
    wrapped.forward = lambda x: 2 * inner(x)
    for model, names in ((Lambda(), "conv"), (wrapped, "stem, conv, head")):
        for in_place in (False, True):
            with pytest.raises(DysurgeryError, match=rf"still calls the original \({names}\), through a lambda"):
                dysurgery.convert(model, IMAGE, in_place=in_place)
        assert not dynamic_paths(model)


def test_a_functional_convolution_with_a_parameter_is_left_to_the_graph():
    class Functional(Net):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3, dtype=torch.float64))

        def forward(self, x):
            return F.conv2d(self.conv(self.stem(x)), self.kernel, padding=1)

    assert "as_graph=True" in reasons(Functional())["conv2d"]
    converted(Functional())
    converted(Functional(), expect=("conv", "conv2d"), as_graph=True)


# Wrapped and compiled parts


@pytest.mark.filterwarnings("error:.*global hooks")
@pytest.mark.parametrize("ran", [False, True])
def test_a_compiled_child_is_converted_inside_and_compiles_anew(ran):
    torch._dynamo.reset()
    model = nn.Sequential(conv(3, 4), nn.Sequential(conv(4, 4), nn.ReLU())).double()
    model[1] = torch.compile(model[1], backend="eager")
    if ran:
        model(IMAGE)
    dynamic = converted(model, expect=("1._orig_mod.0",))
    assert type(dynamic[1]) is type(model[1])
    with torch.no_grad():
        dynamic[1]._orig_mod[0].bank.zero_()
        dynamic[1]._orig_mod[0].bias_bank.zero_()
    assert not dynamic(IMAGE).any()
    assert model(IMAGE).any()


def test_a_model_that_compiled_itself_is_converted_and_in_place_stays_compiled():
    torch._dynamo.reset()
    model = Net()
    model.compile(backend="eager")
    expected = model(IMAGE)
    converted(model)
    dysurgery.convert(model, IMAGE, in_place=True)
    assert dynamic_paths(model) == ["conv"]
    assert model._compiled_call_impl is not None
    torch.testing.assert_close(model(IMAGE), expected)
    with torch.no_grad():
        model.conv.bank.zero_()
    assert not torch.equal(model(IMAGE), expected)


def test_a_child_in_data_parallel_is_converted_inside():
    model = nn.Sequential(conv(3, 4), nn.DataParallel(nn.Sequential(conv(4, 4), nn.ReLU()))).double()
    converted(model, expect=("1.module.0",))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_child_stays_as_it_is_and_its_neighbours_are_converted():
    scripted = torch.jit.script(nn.Sequential(conv(4, 4), nn.ReLU()))
    model = nn.Sequential(conv(3, 4), scripted, conv(4, 4)).double()
    dynamic = converted(model, expect=("2",))
    assert isinstance(dynamic[1], torch.jit.ScriptModule)


# Models that are not ready


@pytest.mark.parametrize("lazy", [lambda: nn.LazyConv2d(4, 3), lambda: nn.LazyBatchNorm2d()])
@pytest.mark.parametrize("what", [dysurgery.plan, dysurgery.convert, dysurgery.cost])
def test_a_lazy_model_is_refused_and_stays_lazy_until_it_has_run(lazy, what):
    model = nn.Sequential(conv(3, 4), lazy(), conv(4, 4)).double()
    with pytest.raises(UsageError, match=r"lazy layers without weights \(1.weight, 1.bias.*\): run it once"):
        what(model, IMAGE)
    assert model[1].has_uninitialized_params()
    model.eval()(IMAGE)
    assert "2" in dynamic_paths(dysurgery.convert(model, IMAGE))


def test_on_the_meta_device_there_are_figures_but_no_conversion():
    model, image = Net(), IMAGE.to("meta")
    plan = dysurgery.plan(model, IMAGE)
    model.to("meta")
    found = dysurgery.plan(model, image)
    assert (found.params, found.mult_adds) == (plan.params, plan.mult_adds)
    assert dysurgery.cost(model, image) == plan.before
    for in_place in (False, True):
        with pytest.raises(DysurgeryError, match="meta device, where nothing can be compared"):
            dysurgery.convert(model, image, in_place=in_place)
        assert not dynamic_paths(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("stage", ["prepared", "converted", "qat"])
def test_quantised_convolutions_are_refused_with_the_reason(stage):
    quantization = torch.ao.quantization
    layers = (conv(3, 4), nn.ReLU(), conv(4, 4))
    model = nn.Sequential(quantization.QuantStub(), *layers, quantization.DeQuantStub()).train(stage == "qat")
    engine = torch.backends.quantized.engine
    if stage == "qat":
        model.qconfig = quantization.get_default_qat_qconfig(engine)
        model = quantization.prepare_qat(model)
    else:
        model.qconfig = quantization.get_default_qconfig(engine)
        model = quantization.prepare(model)
    model(IMAGE.float())
    if stage == "converted":
        model = quantization.convert(model)
    why = {
        "prepared": "2 it holds parameters, buffers or modules beside its weight and bias",
        "converted": "it has no convolution",
        "qat": r"2 no handler for torch\.ao\.nn\.qat",
    }
    with pytest.raises(UsageError, match=why[stage]):
        dysurgery.convert(model, IMAGE.float())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_beside_dynamically_quantised_linear_layers_convolutions_are_converted():
    model = nn.Sequential(conv(3, 4), conv(4, 4), nn.Flatten(), nn.Linear(256, 2))
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    dynamic = dysurgery.convert(model, IMAGE.float())
    assert dynamic_paths(dynamic) == ["1"]
    torch.testing.assert_close(dynamic(IMAGE.float()), model(IMAGE.float()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("thing", [threading.Lock, lambda: (i for i in range(3)), lambda: sys.__stderr__])
def test_a_model_that_cannot_be_copied_is_refused_with_what_is_in_the_way(thing):
    model = Net()
    model.thing = thing()
    for call in (dysurgery.plan, dysurgery.convert, dysurgery.cost):
        with pytest.raises(DysurgeryError, match=r"Net cannot be copied \(copy.deepcopy: TypeError: cannot pickle '"):
            call(model, IMAGE)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_that_keeps_an_activation_of_an_earlier_run_is_converted(in_place):
    class Keeps(Net):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    model = Keeps()
    expected = model(IMAGE)
    dynamic = dysurgery.convert(model, IMAGE, in_place=in_place)
    assert model.last is expected
    assert dynamic_paths(dynamic) == ["conv"]
    torch.testing.assert_close(dynamic(IMAGE), expected)


def test_a_model_whose_copies_are_no_copies_is_refused():
    class Same(Net):
        def __deepcopy__(self, memo):
            return self

    class Anew(Net):
        def __deepcopy__(self, memo):
            made = Anew()
            made.load_state_dict(self.state_dict())
            return made

    model = Same().train()
    with pytest.raises(DysurgeryError, match="the __deepcopy__ of Same returns the original"):
        dysurgery.convert(model, IMAGE)
    assert model.training
    with pytest.raises(DysurgeryError, match="the copy of the model does not hold them"):
        dysurgery.convert(Anew(), IMAGE)


# Classes with ways of their own


def test_properties_and_attributes_that_are_looked_up_elsewhere():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

        @property
        def device(self):
            return next(self.parameters()).device

        @property
        def body(self):
            return self.inner.conv

        def forward(self, x):
            return self.body(self.stem(x.to(self.device)))

    model = Wrapper(Net())
    dynamic = converted(model, expect=("inner.conv",))
    assert dynamic.conv is dynamic.body is dynamic.inner.conv


def test_a_class_that_refuses_to_be_assigned_to_is_converted_in_place_too():
    class Frozen(Net):
        def __setattr__(self, name, value):
            if name in self.__dict__.get("_modules", {}):
                raise AttributeError(name)
            super().__setattr__(name, value)

    model = Frozen()
    converted(model)
    dysurgery.convert(model, IMAGE, in_place=True)
    assert dynamic_paths(model) == ["conv"]


def test_a_module_with_slots_which_no_copy_keeps_is_refused():
    class Slots(Net):
        __slots__ = ("scale",)

        def forward(self, x):
            return self.scale * super().forward(x)

    model = Slots()
    model.scale = 2.0
    with pytest.raises(DysurgeryError, match="'Slots' object has no attribute 'scale'"):
        dysurgery.convert(model, IMAGE)


def test_attributes_of_a_convolution_that_its_model_reads_are_there():
    class Reads(Net):
        def forward(self, x):
            x = self.stem(x).view(-1, self.conv.in_channels, 8, 8)
            x = F.pad(x, [self.conv.dilation[0] * (self.conv.kernel_size[0] - 1)] * 4)
            return self.conv(x)[:, :, :: self.conv.stride[0]] / self.conv.out_channels + self.conv.groups

    converted(Reads())


@pytest.mark.parametrize("what", ["parameter", "buffer", "module", "state_dict hook"])
def test_a_convolution_that_carries_something_of_its_own_stays_static(what):
    model = Net()
    if what == "parameter":
        model.conv.alpha = nn.Parameter(torch.ones(1))
    elif what == "buffer":
        model.conv.register_buffer("mask", torch.ones(1))
    elif what == "module":
        model.conv.activation = nn.ReLU()
    else:
        model.conv._register_state_dict_hook(lambda module, state, prefix, metadata: state.pop(f"{prefix}weight"))
    assert ("state_dict hooks" if what == "state_dict hook" else "beside its weight and bias") in reasons(model)["conv"]


def test_a_state_dict_hook_of_the_model_is_kept():
    model = Net()

    def rename(module, state, prefix, metadata):
        for key in list(state):
            state[f"net.{key}"] = state.pop(key)

    def back(module, state, *others):
        for key in list(state):
            state[key.removeprefix("net.")] = state.pop(key)

    model._register_state_dict_hook(rename)
    model.register_load_state_dict_pre_hook(back)
    dynamic = dysurgery.convert(model, IMAGE)
    expected, state = dynamic(IMAGE), copy.deepcopy(dynamic.state_dict())
    assert "net.conv.bank" in state
    with torch.no_grad():
        dynamic.conv.bank.zero_()
    dynamic.load_state_dict(state)
    torch.testing.assert_close(dynamic(IMAGE), expected)


# Parameters of every kind


def test_a_half_frozen_model_stays_half_frozen():
    model = Net().train()
    model.stem.requires_grad_(False)
    model.conv.weight.requires_grad_(False)
    model.conv.eval()
    dynamic = converted(model)
    trained = {name for name, parameter in dynamic.named_parameters() if parameter.requires_grad}
    assert trained == {"conv.bias_bank", "head.weight", "head.bias"}
    assert dynamic.training
    assert not any(module.training for module in dynamic.conv.modules())


def test_a_frozen_model_stays_frozen():
    dynamic = converted(Net().requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in dynamic.parameters())


def test_subclasses_of_parameter():
    class Tagged(nn.Parameter):
        pass

    model = Net()
    for module in (model.stem, model.conv):
        module.weight = Tagged(module.weight.data)
    dynamic = converted(model)
    assert type(dynamic.stem.weight) is Tagged
    assert type(dynamic.conv.bank) is nn.Parameter


def test_a_model_made_in_inference_mode_and_one_converted_in_it_can_be_trained():
    with torch.inference_mode():
        made = Net()
        expected = made(IMAGE)
    normal = Net()
    with torch.inference_mode():
        results = [dysurgery.convert(normal, IMAGE.clone()), dysurgery.convert(normal, IMAGE, in_place=True)]
    results.append(dysurgery.convert(made, IMAGE))
    torch.testing.assert_close(results[-1](IMAGE), expected)
    for dynamic in results:
        dynamic.train()(IMAGE).sum().backward()
        assert dynamic.conv.bank.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_train_mode_with_gradients_of_its_type(dtype):
    model, x = Net().to(dtype), IMAGE.to(dtype)
    dynamic = dysurgery.convert(model, x).train()
    output = dynamic(x)
    torch.testing.assert_close(output, model(x), rtol=0.05, atol=0.05)
    output.sum().backward()
    assert dynamic.conv.bank.grad.dtype == dtype
    assert dynamic.conv.bank.grad.isfinite().all()


def test_a_model_of_several_types_keeps_each():
    class Several(Net):
        def forward(self, x):
            return self.head(self.conv(self.stem(x).bfloat16()).float().mean((2, 3)))

    model = Several().float()
    model.conv.bfloat16()
    dynamic = dysurgery.convert(model, IMAGE.float())
    assert {p.dtype for p in dynamic.conv.parameters()} == {torch.bfloat16}
    assert dynamic.stem.weight.dtype == torch.float32
    torch.testing.assert_close(dynamic(IMAGE.float()), model(IMAGE.float()), rtol=0.05, atol=0.05)


def test_channels_last_in_and_out():
    model = Net().to(memory_format=torch.channels_last)
    image = IMAGE.contiguous(memory_format=torch.channels_last)
    dynamic = converted(model, image)
    torch.testing.assert_close(dynamic.features(image), model.features(image))
    assert dynamic.stem.weight.is_contiguous(memory_format=torch.channels_last)


def test_weights_that_are_not_contiguous():
    model = Net()
    model.conv.weight = nn.Parameter(torch.randn(3, 3, 4, 4, dtype=torch.float64).permute(2, 3, 0, 1))
    model.conv.bias = nn.Parameter(torch.randn(8, dtype=torch.float64)[::2])
    assert not model.conv.weight.is_contiguous()
    dynamic = converted(model)
    assert dynamic.conv.bank.is_contiguous()


def test_roots_that_are_no_class_of_their_own():
    converted(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4)).double(), expect=("2",))
    converted(conv(3, 4).double(), expect=("",), layers="all")
    with pytest.raises(DysurgeryError, match="ModuleList does not run"):
        dysurgery.plan(nn.ModuleList([conv(3, 4)]).double(), IMAGE)
