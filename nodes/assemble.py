"""Assemble EMMA Modules."""

from comfy_api.latest import io

from .. import host
from .types import Assembly, Floats, HookKeyframes, Module, Reference, schema


class EMMAAssembleModules(io.ComfyNode):
    """Adds one module with its reference to an assembly; chain several, in any order."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EMMAAssembleModules",
            display_name="Assemble EMMA Modules",
            aliases=("emma", "stack modules", "combine references", "multi modal", "ipadapter combine", "ip-adapter"),
            description="Adds a module and its reference to an assembly. Modules trained apart are summed, without any "
                        "training; chain this node once per module, the order does not matter.",
            inputs=[
                Module.Input("module", tooltip="The EMMA module, from Load EMMA Module."),
                Reference.Input("reference", tooltip="Its reference, from Encode Reference Image with the same module."),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.05,
                               tooltip="How much the reference counts. 0 is as if the module were not there, 1 as trained, "
                                       "or what its file says does best; below 0 what the module adds is subtracted."),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.001,
                               tooltip="From where the reference acts, as a share of the timesteps (not of the steps), as "
                                       "ControlNet's percents are: 0 is pure noise, 1 the finished picture."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.001,
                               tooltip="Until where the reference acts, counted as in start_percent: with 0.5 the lower half "
                                       "of the timesteps has the text alone."),
                Assembly.Input("assembly", optional=True, tooltip="An earlier Assemble EMMA Modules, to add to."),
                io.MultiType.Input("strengths", types=[io.Float, Floats, HookKeyframes], optional=True,
                                   tooltip="Factors on strength that change: a list with one number per frame, from EMMA Frame "
                                           "Strengths or another pack's schedule, or hook keyframes for the course of the "
                                           "sampling."),
            ],
            outputs=[Assembly.Output(display_name="EMMA_ASSEMBLY", tooltip="Wire this into EMMA Connector, or into another "
                                                                         "Assemble EMMA Modules.")],
        )

    @classmethod
    def execute(cls, module, reference, strength, start_percent, end_percent, assembly=None, strengths=None) -> io.NodeOutput:
        return io.NodeOutput(
            host.connecting.assemble(module, reference, strength, start_percent, end_percent, assembly, strengths)
        )
