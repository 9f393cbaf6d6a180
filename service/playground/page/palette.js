// Colours on pictures, told apart with any colour vision (after Okabe and Ito), light enough for dark
// pictures and outlined for light ones.

const GROUPS = ["#ffb000", "#5cc3ff", "#ff6fae", "#2fd39a", "#f2e85c", "#c4a5ff", "#ff8a5c", "#f4f4f4"];
const OBJECTS = ["#e69f00", "#56b4e9", "#2fb58b", "#f0e442", "#5b8def", "#e8743b", "#d98cb8"];

export function groupColour(group) {
  return GROUPS[group % GROUPS.length];
}

export function objectColour(index) {
  return OBJECTS[index % OBJECTS.length];
}

export function channels(colour) {
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
}

export const INK = "#14161b";
export const PAPER = "#ffffff";
