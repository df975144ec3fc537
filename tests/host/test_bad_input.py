"""Every mistake a user can make in a graph is refused by an error of ours: found, wanted, what to do."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import WIDTH, noise, wire


@pytest.fixture(scope="module")
def errors(pack_import):
    return pack_import("emma_core.errors")


@pytest.fixture(scope="module")
def encoder(run_node):
    return run_node("EMMALoadReferenceEncoder", encoder_name="playground (shipped)")[0]


@pytest.fixture(scope="module")
def module(tiny, encoder):
    """A module that needs the shipped encoder."""
    return tiny.module("portrait", {"global": (128, 4)}, encoder=dict(encoder.encoder.description))


@pytest.fixture(scope="module")
def encode(run_node, module, encoder):
    def run(image, mask=None, combine="concat", module=module, encoder=encoder):
        return run_node("EMMAEncodeReference", module=module, encoder=encoder, image=image, mask=mask, combine=combine)[0]

    return run


@pytest.fixture(scope="module")
def connect(run_node, tiny, model, ella):
    """EMMA Connector with some inputs exchanged."""
    usual = {"model": model, "ella": ella, "positive": tiny.text(), "negative": tiny.text(1)}
    return lambda **inputs: run_node("EMMAConnector", **{**usual, **inputs})


@pytest.fixture(scope="module")
def assemble(run_node):
    """Assemble EMMA Modules with some settings exchanged."""
    usual = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    return lambda **inputs: run_node("EMMAAssembleModules", **{**usual, **inputs})


def picture(batch=1, channels=3):
    return noise((batch, 48, 48, channels), 81).sigmoid()


# Files

@pytest.mark.parametrize(("node", "field", "folders", "known"), [
    ("EMMALoadELLA", "ella_name", ["ella"], "ella-sd1.5-tsc-t5xl.safetensors"),
    ("EMMALoadModule", "module_name", ["emma"], "EMMA module"),
    ("EMMALoadTextEncoder", "text_encoder_name", ["text_encoders", "ella_encoder"], "flan-t5-xl"),
    ("EMMALoadReferenceEncoder", "encoder_name", ["clip_vision"], "reference encoder"),
])
@pytest.mark.parametrize("name", ["gone.safetensors", None])
def test_missing_file_names_every_folder(run_node, errors, base_directory, node, field, folders, known, name):
    extra = {"dtype": "auto", "empty_prompt": "natural length"} if node == "EMMALoadTextEncoder" else {}
    with pytest.raises(errors.FileError) as refusal:
        run_node(node, **{field: name, **extra})
    message = str(refusal.value)
    assert message.startswith(f"{name or 'no file'} was not found")
    assert all(str(base_directory / "models" / folder) in message for folder in folders)
    assert known in message and "refresh" in message


@pytest.mark.parametrize("name", ["../outside.safetensors", "absolute"])
def test_file_outside_the_folder_is_not_found(run_node, errors, base_directory, name):
    (base_directory / "models" / "ella").mkdir(parents=True, exist_ok=True)
    outside = base_directory / "models" / "outside.safetensors"
    save_file({"weight": torch.zeros(1)}, outside)
    with pytest.raises(errors.FileError, match="was not found"):
        run_node("EMMALoadELLA", ella_name=str(outside) if name == "absolute" else name)


def write_pickle(path):
    torch.save({"weight": torch.zeros(3)}, path)


def write_truncated(path):
    save_file({"weight": torch.zeros(3000)}, path)
    path.write_bytes(path.read_bytes()[:400])


def write_page(path):
    path.write_text("<!DOCTYPE html><html>sign in to download this file</html>")


def write_other(path):
    save_file({"weight": torch.zeros(3)}, path)


@pytest.mark.parametrize(("write", "found"), [
    (write_pickle, "is a pickled PyTorch file"), (write_truncated, "is truncated"), (write_page, "is not a safetensors file"),
    (write_other, "Choose|not an? |no `emma` metadata"),
])
@pytest.mark.parametrize(("node", "field", "folder", "error"), [
    ("EMMALoadELLA", "ella_name", "ella", "ConnectorFileError"),
    ("EMMALoadModule", "module_name", "emma", "ModuleFileError"),
    ("EMMALoadTextEncoder", "text_encoder_name", "text_encoders", "TextEncoderFileError"),
    ("EMMALoadReferenceEncoder", "encoder_name", "clip_vision", "EncoderFileError"),
])
def test_file_of_another_kind_is_refused(run_node, errors, base_directory, node, field, folder, error, write, found):
    path = base_directory / "models" / folder / f"{write.__name__}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    extra = {"dtype": "auto", "empty_prompt": "natural length"} if node == "EMMALoadTextEncoder" else {}
    with pytest.raises(getattr(errors, error), match=found):
        run_node(node, **{field: path.name, **extra})


def test_unknown_playground_picture_names_those_there(run_node, errors):
    with pytest.raises(errors.FileError, match=r"no picture named 'nobody'; it has .*Choose one of these"):
        run_node("EMMAPlaygroundPicture", picture="nobody")


def test_playground_pictures_come_one_behind_the_other_in_one_batch(run_node):
    first = run_node("EMMAPlaygroundPicture", picture="style-noto")[0]
    both = run_node("EMMAPlaygroundPicture", picture="face-dark", pictures=first)[0]
    alone = run_node("EMMAPlaygroundPicture", picture="face-dark")[0]
    assert torch.equal(both, torch.cat([first, alone])) and not torch.equal(first, alone)


def test_playground_picture_behind_pictures_of_another_size_is_refused(run_node, errors):
    with pytest.raises(errors.ImageInputError, match=r"are 40 x 48, the playground's 128 x 128: .*scale yours"):
        run_node("EMMAPlaygroundPicture", picture="face-dark", pictures=torch.zeros(1, 48, 40, 3))


# Pictures and masks

def test_empty_batch_is_refused(encode, errors):
    with pytest.raises(errors.ImageInputError, match=r"empty or misshapen \(shape \(0, 48, 48, 3\)\).*Check the node before"):
        encode(picture()[:0])


def test_picture_without_pixels_is_refused(encode, errors):
    with pytest.raises(errors.ImageInputError, match="empty or misshapen"):
        encode(torch.zeros(1, 0, 48, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_picture_that_is_not_finite_is_refused(encode, errors, value):
    image = picture()
    image[0, 3, 4, 1] = value
    with pytest.raises(errors.ImageInputError, match="NaN or infinite values; wanted 0 to 1.*VAE in float16"):
        encode(image)


def test_picture_of_0_to_255_is_refused(encode, errors):
    with pytest.raises(errors.ImageInputError, match="values up to 2[0-9][0-9]; wanted 0 to 1. Divide it by 255"):
        encode(picture() * 255)


def test_small_overshoot_of_resampling_is_clipped(encode):
    image = picture()
    image[0, 0, 0] = torch.tensor([1.04, -0.03, 0.5])
    assert torch.equal(encode(image).features["global"], encode(image.clamp(0, 1)).features["global"])


def test_grey_picture_is_repeated(encode):
    grey = picture(channels=1)
    torch.testing.assert_close(encode(grey).features["global"], encode(grey.repeat(1, 1, 1, 3)).features["global"])


def test_transparent_pixels_are_white(encode):
    rgba = picture(channels=4)
    rgba[..., 3] = (torch.arange(48) < 20).float()
    flat = rgba[..., :3].clone()
    flat[:, :, 20:] = 1
    assert torch.equal(encode(rgba).features["global"], encode(flat).features["global"])


def test_other_numbers_of_channels_are_refused(encode, errors):
    with pytest.raises(errors.ImageInputError, match=r"has 2 channels; wanted 1 \(grey\), 3 \(RGB\) or 4 \(RGBA\)"):
        encode(picture(channels=2))


@pytest.mark.parametrize(("mask", "found"), [
    (torch.zeros(1, 0, 48), r"empty, misshapen or not finite \(shape \(1, 0, 48\)\)"),
    (torch.zeros(0, 48, 48), r"empty, misshapen or not finite \(shape \(0, 48, 48\)\)"),
    (torch.full((1, 48, 48), float("nan")), "not finite"),
    (torch.zeros(1, 48, 48), "mask 1 is all black.*white marks the object to keep.*Invert Mask"),
    (torch.ones(3, 48, 48), "3 masks for 2 reference pictures; wanted 1 or 2"),
])
def test_unusable_mask_is_refused(encode, errors, mask, found):
    with pytest.raises(errors.ImageInputError, match=found):
        encode(picture(2), mask)


def test_one_black_mask_among_several_is_named(encode, errors):
    masks = torch.ones(2, 48, 48)
    masks[1] = 0
    with pytest.raises(errors.ImageInputError, match="mask 2 is all black"):
        encode(picture(2), masks)


@pytest.mark.parametrize("shape", [(48, 48), (1, 48, 48), (1, 1, 48, 48), (1, 12, 12)])
def test_white_mask_of_any_shape_keeps_the_picture(encode, shape):
    assert torch.equal(encode(picture(2), torch.ones(shape), "average").features["global"],
                       encode(picture(2), combine="average").features["global"])


# Parts that do not belong together

def test_encoder_of_another_family_is_refused(encode, errors, tiny):
    clip_module = tiny.module("object", {"global": (128, 4)}, encoder={"family": "clip-vit-h-14"})
    found = r"this encoder is the CLIP of SD1.5 .*, fingerprint .*the object module needs CLIP ViT-H/14 .*Load that encoder"
    with pytest.raises(errors.ReferenceMismatchError, match=found):
        encode(picture(), module=clip_module)


def test_encoder_with_other_weights_is_refused(encode, errors, tiny):
    other = tiny.module("style", {"global": (128, 4)}, encoder={"family": "clip-miniature", "fingerprint": "0123456789abcdef"})
    with pytest.raises(errors.ReferenceMismatchError, match=r"needs the CLIP of .*, fingerprint 0123456789ab\."):
        encode(picture(), module=other)


def test_feature_the_encoder_lacks_is_named(encode, errors, tiny):
    other = tiny.module("pose", {"skeleton": (128, 4)})
    with pytest.raises(errors.ReferenceMismatchError, match="features skeleton are needed; this encoder gives face, global"):
        encode(picture(), module=other)


def test_reference_for_another_module_is_refused(assemble, encode, errors, tiny):
    other = tiny.module("object", {"local": (160, 1)})
    with pytest.raises(errors.ReferenceMismatchError, match="holds the features global; the object module needs local. Encode"):
        assemble(module=other, reference=encode(picture()))


def test_reference_of_another_encoder_is_refused_when_assembled(assemble, errors, tiny, module):
    foreign = tiny.reference(tiny.module("portrait", {"global": (128, 4)}, encoder={"family": "adaface"}))
    with pytest.raises(errors.ReferenceMismatchError, match="by adaface; the portrait module needs the CLIP of SD1.5"):
        assemble(module=module, reference=foreign)


@pytest.mark.parametrize(("settings", "found"), [
    ({"start_percent": 0.7, "end_percent": 0.2}, r"acts from 0\.7 to 0\.2 of the sampling; wanted 0 <= start <= end <= 1"),
    ({"strength": float("nan")}, "strength nan is not finite"),
])
def test_impossible_settings_are_refused(assemble, encode, errors, module, settings, found):
    with pytest.raises(errors.ReferenceMismatchError, match=found):
        assemble(module=module, reference=encode(picture()), **settings)


def test_module_for_another_ella_is_refused(errors, tiny, model):
    module = tiny.module()
    larger = tiny.ella(layers=3)
    with pytest.raises(errors.ConnectorMismatchError, match="a connector of width 64, 2 blocks.*has width 64, 3 blocks"):
        wire(tiny, model, larger, tiny.text(), tiny.text(1), tiny.assemble((module, tiny.reference(module))))


def test_module_trained_on_another_ella_warns_once(caplog, tiny, model):
    module, ella = tiny.module(ella={"sha256": "a" * 64}), tiny.ella()
    ella.connector.sha256 = "b" * 64
    assembly = tiny.assemble((module, tiny.reference(module)))
    wire(tiny, model, ella, [*tiny.text(), *tiny.text(3, seed=9)], tiny.text(1), assembly)
    warnings = [record.message for record in caplog.records if "was trained on another ELLA" in record.message]
    assert len(warnings) == 1 and "EMMA Connector" in warnings[0] and "aaaaaaaaaaaa" in warnings[0]


@pytest.mark.parametrize("which", ["positive", "negative"])
def test_clip_conditioning_as_text_is_refused(connect, errors, tiny, which):
    found = rf"shape \(1, 77, {WIDTH}\).*wants \(prompts, tokens, 24\).*not with CLIP"
    with pytest.raises(errors.ConnectorMismatchError, match=found):
        connect(**{which: tiny.clip_text()})


@pytest.mark.parametrize("which", ["positive", "negative"])
def test_connected_conditioning_is_refused_as_text(connect, errors, which):
    model, connected, _ = connect()
    with pytest.raises(errors.ConnectorMismatchError, match="went through EMMA Connector before.*assemble all modules before"):
        connect(model=model, **{which: connected})


def test_conditioning_without_text_is_refused(connect, errors):
    with pytest.raises(errors.ConnectorMismatchError, match="holds no text features. Wire a CLIP Text Encode node"):
        connect(positive=[[None, {}]])


@pytest.mark.parametrize("which", ["clip_positive", "clip_negative"])
def test_clip_tokens_of_another_width_are_refused(connect, errors, tiny, which):
    with pytest.raises(errors.ConnectorMismatchError, match="has width 24, the ELLA's tokens 64. Encode it with the CLIP of"):
        connect(**{which: tiny.text()})


def test_connected_conditioning_is_refused_as_clip(connect, errors):
    connected = connect()[1]
    with pytest.raises(errors.ConnectorMismatchError, match="from an EMMA Connector, whose tokens cannot be appended. Wire"):
        connect(clip_positive=connected)


def test_other_number_of_clip_entries_is_refused(connect, errors, tiny):
    three = [*tiny.clip_text(), *tiny.clip_text(seed=6), *tiny.clip_text(seed=7)]
    with pytest.raises(errors.ConnectorMismatchError, match="has 3 entries for 2 of T5; wanted 1 or as many"):
        connect(positive=[*tiny.text(), *tiny.text(3)], clip_positive=three)


def test_clip_vision_that_is_no_clip_is_refused(encode, errors, tiny):
    dino = type("ClipVision", (), {"model": torch.nn.Linear(2, 2), "image_size": 224})()
    with pytest.raises(errors.EncoderFileError, match=r"no CLIP model \(SigLIP and DINOv2 are others\)"):
        encode(picture(), module=tiny.module(), encoder=dino)


def test_interrupt_stops_encoding(encode):
    import comfy.model_management

    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        encode(picture())
    assert encode(picture()).rows == 1, "the host clears the flag"


def test_messages_name_no_python_internals(errors, encode):
    """What a user reads is words, not a traceback's."""
    with pytest.raises(errors.ImageInputError) as refusal:
        encode(picture() * 255)
    assert not re.search(r"tensor\(|0x[0-9a-f]+|NoneType", str(refusal.value))


def test_the_error_panel_names_the_error_without_the_folder(errors):
    from execution import full_type_name

    assert full_type_name(errors.ModuleFileError) == "emma_core.ModuleFileError"
