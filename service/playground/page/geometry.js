// Where points and queries lie. All positions are [x, y] in pixels of the picture.

// The cells of a map that lie in the picture, from the queries that stand in two of its corners.
export class Grid {
  constructor(first, last) {
    this.first = first;
    this.rows = [first.row, last.row];
    this.columns = [first.column, last.column];
    this.pitch = [
      pitch(first.centre[0], last.centre[0], last.column - first.column),
      pitch(first.centre[1], last.centre[1], last.row - first.row),
    ];
  }

  centre({ row, column }) {
    const [x, y] = this.first.centre;
    return [
      x + (column - this.first.column) * this.pitch[0],
      y + (row - this.first.row) * this.pitch[1],
    ];
  }

  nearest([x, y]) {
    const [x0, y0] = this.first.centre;
    return this.within({
      row: this.first.row + steps(y - y0, this.pitch[1]),
      column: this.first.column + steps(x - x0, this.pitch[0]),
    });
  }

  within({ row, column }) {
    return { row: clamp(row, ...this.rows), column: clamp(column, ...this.columns) };
  }
}

function pitch(from, to, cells) {
  return cells ? (to - from) / cells : 0;
}

function steps(distance, size) {
  return size ? Math.round(distance / size) : 0;
}

export function clamp(value, least, most) {
  return Math.min(Math.max(value, least), most);
}

export function layerName(layer) {
  return `${layer.stage}.${layer.block}`;
}

// Of every point of a layer: its group, where it began, where the model read, and what it receives.
// Points are counted over groups, rows, columns; keys over rows, columns.
export function pointsOf(layer, received) {
  const references = layer.reference_points.flat();
  const amounts = received?.flat(2);
  const points = [];
  layer.sampling_locations.forEach((group, index) => {
    group.flat().forEach((location, key) => {
      const amount = amounts ? amounts[points.length] : null;
      points.push({ group: index, key, reference: references[key], location, received: amount });
    });
  });
  return points;
}

// A point on its way: 0 is the reference, 1 where the model read.
export function travelled(point, share) {
  const [x0, y0] = point.reference;
  const [x1, y1] = point.location;
  return [x0 + (x1 - x0) * share, y0 + (y1 - y0) * share];
}

// The cells that a query sees in its window, the heaviest first, by their weights over the shown heads.
export function cellsOf(query, hidden) {
  if (!hidden.size) return query.keys.map(({ key, weight, points }) => ({ key, weight, point: points[0] }));
  const cells = new Map();
  query.groups.forEach((keys, head) => {
    if (hidden.has(head)) return;
    for (const { key, weight, point } of keys) {
      const cell = cells.get(key) ?? { key, weight: 0, point };
      cells.set(key, { ...cell, weight: cell.weight + weight });
    }
  });
  return [...cells.values()].sort((a, b) => b.weight - a.weight);
}

// The radius of a point of average attention, in pixels of the screen, so that points leave room.
export function baseRadius(count, width, height) {
  return clamp(Math.sqrt((width * height) / Math.max(count, 1)) * 0.075, 1.6, 7);
}

// The area of a circle follows the attention that the point receives.
export function relativeRadius(amount, mean) {
  return mean > 0 ? clamp(Math.sqrt(amount / mean), 0.3, 2.6) : 1;
}

export function isIn([x, y], detection, mask) {
  if (mask) return mask.has(Math.floor(x), Math.floor(y));
  const [x1, y1, x2, y2] = detection.box;
  return x >= x1 && x < x2 && y >= y1 && y < y2;
}
