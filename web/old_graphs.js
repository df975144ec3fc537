// EMMA Connector had no `adding` at first: a graph that was saved without it has its references added up in the blocks, as then.
import { app } from "../../scripts/app.js";

app.registerExtension({
    name: "EMMA.OldGraphs",
    beforeRegisterNodeDef(nodeType, nodeData) {
        if (nodeData.name !== "EMMAConnector") return;
        const configured = nodeType.prototype.onConfigure;
        nodeType.prototype.onConfigure = function (saved) {
            configured?.apply(this, arguments);
            if (!saved.widgets_values?.length) this.widgets.find((widget) => widget.name === "adding").value = "blocks";
        };
    },
});
