"""What the nodes Assemble EMMA Modules and EMMA Connector do."""

import logging
import warnings

from ..emma_core.encoders.matching import check_for_module
from ..emma_core.errors import ConnectorMismatchError, EmmaWarning
from ..emma_core.model.addition import Addition
from ..emma_core.model.assembly import Reference, TokenSource
from ..emma_core.model.reference_features import ReferenceFeatures
from .conditioning import add_references, check_own_text, connect_conditioning
from .families import family_of, own_tokens_of
from .loaded import LoadedConnector, LoadedModule
from .payload import HostAssembly
from .seam import check_takes_ella, connect_model
from .strengths import changing_strength


def assemble(
    module: LoadedModule, reference: ReferenceFeatures, strength: float, start_percent: float, end_percent: float,
    assembly: HostAssembly | None, strengths=None,
) -> HostAssembly:
    """One more reference in an assembly.

    Args:
        strengths: factors on ``strength`` that change, see `changing_strength`; None: it stays.
    Raises:
        ReferenceMismatchError: the reference was encoded for another module, the range is empty, or the strengths are no
            numbers or not one per frame.
    """
    check_for_module(reference, module.module.config)
    changing, keyframes = changing_strength(strength, strengths)
    added = Reference(module.module, reference.features, changing, start_percent, end_percent, keyframes)
    return (assembly or HostAssembly()).with_reference(module, added)


def connect(
    model, ella: LoadedConnector | None, positive: list, negative: list, assembly: HostAssembly | None,
    clip_positive: list | None, clip_negative: list | None, addition: Addition | None = None,
):
    """MODEL, positive and negative for the sampler.

    Args:
        ella: the connector; None: the references act on the tokens that the model reads anyway.
        positive, negative: of ELLA's text encoder, or of the checkpoint's own.
    Raises:
        ConnectorMismatchError: model, connector, modules and text do not fit together.
    """
    assembly = assembly or HostAssembly()
    if ella is None:
        return _connect_own_tokens(model, positive, negative, assembly, clip_positive or clip_negative, addition)
    _check_ella(ella)
    check_takes_ella(model, ella.connector.width)
    connected = connect_model(model, [ella.patcher, *assembly.patchers])
    _check_modules(ella.connector, assembly)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EmmaWarning)  # said above, once per module
        positive = connect_conditioning(ella, positive, assembly, clip_positive, addition)
        negative = connect_conditioning(ella, negative, HostAssembly(), clip_negative)
    return connected, positive, negative


def _connect_own_tokens(model, positive, negative, assembly: HostAssembly, appended, addition: Addition | None):
    if appended:
        raise ConnectorMismatchError("clip_positive and clip_negative are appended to an ELLA's tokens, and no ELLA is wired. "
                                     "Wire the checkpoint's conditioning into positive and negative, or Load ELLA into ella.")
    source = own_tokens_of(model, positive)
    check_own_text(model, source, positive + negative)
    _check_modules(source, assembly)
    connected = connect_model(model, assembly.patchers)
    return connected, add_references(positive, family_of(model.model), assembly, addition), negative


def _check_ella(ella) -> None:
    """ComfyUI-ELLA's socket has the name of ours, so the editor lets its wire be drawn here."""
    if not isinstance(ella, LoadedConnector):
        raise ConnectorMismatchError(f"this ELLA comes from another node pack (a {type(ella).__name__}); wanted the output of "
                                     "Load ELLA. Use Load ELLA with the same file.")


def _check_modules(source: TokenSource, assembly: HostAssembly) -> None:
    """Refuse modules of another kind or shape; say in the log where one was trained on another ELLA."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EmmaWarning)
        for reference in assembly.references:
            source.check_fits(reference.module)
    for warning in caught:
        logging.warning("EMMA Connector: %s", warning.message)
