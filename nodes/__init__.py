"""The nodes; ids are promises to shared workflows and never change."""

from comfy_api.latest import ComfyExtension, io

from .assemble import EMMAAssembleModules
from .connect import EMMAConnector
from .encode import EMMAEncodeReference
from .gate_map import EMMAGateMap
from .load import EMMALoadELLA, EMMALoadModule, EMMALoadReferenceEncoder, EMMALoadTextEncoder
from .playground import EMMAPlayground, EMMAPlaygroundPicture
from .references import EMMALoadReference, EMMASaveReference
from .story import EMMAPromptList
from .train import EMMAIPAdapterTeacher, EMMASaveModule, EMMATrainModule
from .training_folder import EMMALoadTrainingFolder
from .video import EMMABlendReferences, EMMAFrameStrengths


class EmmaExtension(ComfyExtension):
    """What the host asks for the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            EMMALoadELLA, EMMALoadTextEncoder, EMMALoadModule, EMMALoadReferenceEncoder, EMMAEncodeReference,
            EMMAAssembleModules, EMMAConnector, EMMAGateMap, EMMAPlayground, EMMAPlaygroundPicture,
            EMMASaveReference, EMMALoadReference, EMMATrainModule, EMMASaveModule, EMMAFrameStrengths,
            EMMABlendReferences, EMMAPromptList, EMMAIPAdapterTeacher, EMMALoadTrainingFolder,
        ]
