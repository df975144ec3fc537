"""The shipped playground in the host's own UNet, T5, VAE and sampler, against the bare machine."""

import itertools
import json
import urllib.parse
import urllib.request
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from emma_harness import server_client
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("woman astronaut", "man cook")
MOST_TOKEN_ERROR = 1e-4
LEAST_PSNR_DB = 40.0


def psnr_db(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(-10 * torch.log10((found - wanted).square().mean().clamp_min(1e-12)))


@pytest.fixture(scope="module")
def machine(pack_import):
    """The playground as `python -m emma_core generate` loads it."""
    config, folder = pack_import("emma_core.base.config"), pack_import("emma_core.playground").PLAYGROUND_DIR
    return pack_import("emma_core.base.text_to_image").TextToImage(
        config.BaseConfig(), config.EllaConfig(), [str(folder / "encoder.safetensors")], "", "fp32", torch.device("cpu"))


@pytest.fixture(scope="module")
def bare_assembly(pack_import, machine, pictures):
    assembly, folder = pack_import("emma_core.model.assembly"), pack_import("emma_core.playground").PLAYGROUND_DIR
    modules = {condition: machine.load_module(str(folder / f"emma-{condition}.safetensors")) for condition in pictures}
    return assembly.Assembly([assembly.Reference(modules[condition], machine.features(modules[condition], picture))
                              for condition, picture in pictures.items()])


@pytest.fixture(scope="module")
def playground(pack_import):
    return pack_import("host.playground").load_playground()


@pytest.fixture(scope="module")
def pictures(pack_import):
    load = pack_import("host.playground").reference_picture
    return {"style": load("style-twemoji"), "face": load("face-dark")}


@pytest.fixture(scope="module")
def host_assembly(pack_import, playground, pictures):
    encoders, connecting = pack_import("host.encoders"), pack_import("host.connecting")
    assembly = None
    for condition, module in (("style", playground.style), ("face", playground.face)):
        reference, _ = encoders.encode_reference(module, playground.encoder, pictures[condition], None, "concat")
        assembly = connecting.assemble(module, reference, 1.0, 0.0, 1.0, assembly)
    return assembly


@pytest.mark.parametrize("prompt", PROMPTS)
def test_host_and_bare_machine_give_the_same_tokens(
    pack_import, playground, bare_assembly, host_assembly, host_nodes, prompt
):
    conditioning, = host_nodes.CLIPTextEncode().encode(playground.clip, prompt)
    payload = pack_import("host.payload").EmmaPayload(playground.ella, conditioning[0][0], host_assembly)
    folder = pack_import("emma_core.playground").PLAYGROUND_DIR
    text_1ND, = pack_import("emma_core.text.encoder").load_text_encoder(folder / "t5.safetensors").encode([prompt])
    connector = pack_import("emma_core.files.connector_file").load_connector(folder / "ella.safetensors")
    for timestep in (981, 500, 1):
        wanted_1KW = connector.tokens(text_1ND, torch.tensor([timestep]), bare_assembly)
        [found_1KW] = payload.tokens(torch.tensor([timestep]), [], None)
        assert ((found_1KW - wanted_1KW).abs().max() / wanted_1KW.std()).item() <= MOST_TOKEN_ERROR


@pytest.mark.parametrize("with_references", [False, True])
def test_host_and_bare_machine_give_the_same_picture(
    pack_import, machine, playground, bare_assembly, host_assembly, host_nodes, with_references
):
    pipeline, empty = pack_import("emma_core.base.pipeline"), pack_import("emma_core.model.assembly").Assembly()
    request = pipeline.Request(PROMPTS[0], bare_assembly if with_references else empty, seed=3)
    [wanted] = machine.draw([request], pipeline.Sampling())
    wanted_1HW3 = torch.from_numpy(np.array(wanted, dtype=np.float32) / 255)[None]
    encode = host_nodes.CLIPTextEncode().encode
    model, positive, negative = pack_import("host.connecting").connect(
        playground.model, playground.ella, encode(playground.clip, PROMPTS[0])[0], encode(playground.clip, "")[0],
        host_assembly if with_references else None, None, None,
    )
    latent, = host_nodes.EmptyLatentImage().generate(128, 128, 1)
    sampled, = host_nodes.KSampler().sample(model, 3, 20, 4.0, "ddim", "ddim_uniform", positive, negative, latent, 1.0)
    found_1HW3, = host_nodes.VAEDecode().decode(playground.vae, sampled)
    assert psnr_db(found_1HW3, wanted_1HW3) >= LEAST_PSNR_DB


def test_vae_nodes_take_the_autoencoder(playground, host_nodes, pictures):
    latent, = host_nodes.VAEEncode().encode(playground.vae, pictures["style"])
    assert latent["samples"].shape == (1, 4, 16, 16)
    restored, = host_nodes.VAEDecode().decode(playground.vae, latent)
    assert psnr_db(restored, pictures["style"]) > 20
    tiled, = host_nodes.VAEDecodeTiled().decode(playground.vae, latent, 64, 0)
    assert tiled.shape == restored.shape
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:96, 32:96] = 1
    inpaint, = host_nodes.VAEEncodeForInpaint().encode(playground.vae, pictures["style"], mask)
    assert inpaint["samples"].shape == (1, 4, 16, 16) and "noise_mask" in inpaint


def test_playground_workflow_runs_on_the_server(server, pack_import):
    client = server_client.ComfyClient(server.url)
    workflow = json.loads((ROOT / "workflows" / "02-compare.json").read_text(encoding="utf-8"))
    prompt = server_client.api_prompt(workflow, client.object_info())
    outputs = client.run(prompt)
    found = {}
    for title in ("text only", "+ style", "+ face", "+ style + face"):
        image = outputs[server_client.node_titled(prompt, title)]["images"][0]
        query = urllib.parse.urlencode(image)
        with urllib.request.urlopen(f"{server.url}/view?{query}") as answer:
            found[title] = np.asarray(Image.open(BytesIO(answer.read())).convert("RGB"), dtype=np.float32)
    assert found["text only"].shape == (128, 128, 3)
    titles = ("text only", "+ style", "+ face", "+ style + face")
    for first, second in itertools.pairwise(titles):
        assert np.abs(found[first] - found[second]).mean() > 1, (first, second)


def sampled(host_nodes, playground, positive, side_px: int, model=None):
    negative = host_nodes.CLIPTextEncode().encode(playground.clip, "")[0] if model is None else positive
    latent = {"samples": torch.zeros(1, 4, side_px // 8, side_px // 8)}
    host_nodes.KSampler().sample(model or playground.model, 1, 1, 1.0, "euler", "normal", positive, negative, latent)


def test_text_past_the_connector_and_other_sizes_are_told_once(pack_import, host_nodes, caplog):
    """Both sample without an error, and give a picture that a newcomer would take for a fault of the pack."""
    world = pack_import("host.playground").load_playground()
    positive = host_nodes.CLIPTextEncode().encode(world.clip, "man cook")[0]
    for _ in range(2):
        sampled(host_nodes, world, positive, 512)
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("EMMA playground")]
    assert len(told) == 2
    assert "past EMMA Connector" in told[0] and "512 x 512; " in told[1] and "128 x 128" in told[1]


def test_what_the_playground_is_made_for_is_not_told(pack_import, host_nodes, caplog):
    world = pack_import("host.playground").load_playground()
    encode = host_nodes.CLIPTextEncode().encode
    model, positive, _ = pack_import("host.connecting").connect(
        world.model, world.ella, encode(world.clip, "man cook")[0], encode(world.clip, "")[0], None, None, None)
    sampled(host_nodes, world, positive, 128, model)
    assert not [record for record in caplog.records if record.getMessage().startswith("EMMA playground")]


def preview(host_previews, latent_format, latent_14hw: torch.Tensor) -> np.ndarray:
    """(h, w, 3) in [0, 1], as the host shows it while sampling."""
    arguments = [getattr(latent_format, f"latent_rgb_factors{part}") for part in ("", "_bias", "_reshape")
                 if hasattr(latent_format, f"latent_rgb_factors{part}")]
    shown = host_previews.Latent2RGBPreviewer(*arguments).decode_latent_to_preview(latent_format.process_in(latent_14hw))
    return np.asarray(shown, dtype=np.float32) / 255


@pytest.mark.parametrize("name", ["style-noto", "style-twemoji", "face-dark", "object-farmer"])
def test_previews_while_sampling_show_the_pictures_own_colours(pack_import, playground, name):
    import comfy.latent_formats
    import latent_preview

    wanted_HW3 = pack_import("host.playground").reference_picture(name)[0].numpy()
    latent_14hw = playground.vae.encode(torch.from_numpy(wanted_HW3)[None])

    def error(latent_format) -> float:
        shown_hw3 = preview(latent_preview, latent_format, latent_14hw)
        side = 128 // len(shown_hw3)
        return float(np.abs(shown_hw3 - wanted_HW3.reshape(128 // side, side, 128 // side, side, 3).mean((1, 3))).mean())

    shows_pictures = hasattr(comfy.latent_formats.LatentFormat, "latent_rgb_factors_reshape")
    allowed = 0.05 if shows_pictures else 0.75 * error(comfy.latent_formats.SD15())
    assert error(playground.model.model.latent_format) < allowed


def test_words_that_it_never_read_are_told_once_with_the_nearest(pack_import, host_nodes, caplog):
    """Through a clone too: other nodes clone the CLIP that they are given."""
    clip = pack_import("host.playground").load_playground().clip
    for each in (clip, clip, clip.clone()):
        host_nodes.CLIPTextEncode().encode(each, "woman docter")
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("EMMA playground")]
    assert len(told) == 1 and "'docter' (nearest: 'doctor')" in told[0]


def test_a_long_reference_is_cropped_with_a_note(pack_import, tiny, caplog):
    """In the log and for the node; padded, nothing is said."""
    encoders, told = pack_import("host.encoders"), []
    world = pack_import("host.playground").load_playground()
    wide = torch.rand(1, 40, 120, 3, generator=torch.Generator().manual_seed(0))
    pad = pack_import("emma_core.encoders.options").Framing("pad")
    encoders.encode_reference(world.style, world.encoder, wide, None, "concat", pad, tell=told.append)
    assert not told
    encoders.encode_reference(world.style, world.encoder, wide, None, "concat", tell=told.append)
    assert len(told) == 1 and "of 120 x 40 the encoder sees 40 x 40, 33%" in told[0]
    assert told[0] in caplog.text
