// Each of our socket types has one colour, on dots and wires. A colour palette of the editor that has one of its own wins; a palette
// without one empties the entry of every type when it is loaded, which is passed over.
import { app } from "../../scripts/app.js";

const COLOURS = {
    ELLA: "#d0a95c", EMMA_MODULE: "#4fd0b3", EMMA_ENCODER: "#8ea6cf", EMMA_REFERENCE: "#f06a94", EMMA_ASSEMBLY: "#cfdc57",
    EMMA_TEACHER: "#b98a5e",
    EMMA_TRAINING_SET: "#b58ee0",
};

function keep(colours, type, ours) {
    let shown = colours[type] || ours;
    Object.defineProperty(colours, type, {
        configurable: true, enumerable: true, get: () => shown, set: (palettes) => { shown = palettes || ours; },
    });
}

app.registerExtension({
    name: "EMMA.Colours",
    setup() {
        const canvas = app.canvas, style = document.createElement("style");
        for (const [type, colour] of Object.entries(COLOURS)) {
            keep(canvas.default_connection_color_byType, type, colour);
            keep(canvas.constructor.link_type_colors, type, colour);
        }
        // where nodes are drawn by the page and not on the canvas; what a palette sets stands on the element and wins
        style.textContent = `:root { ${Object.entries(COLOURS).map(([type, colour]) => `--color-datatype-${type}: ${colour};`).join(" ")} }`;
        document.head.append(style);
    },
});
