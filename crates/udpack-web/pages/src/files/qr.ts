/** A QR code as a drawing, without markup. */

import encodeQR from 'qr';

/** Black on white in each colour scheme: cameras want it so. */
export function qrCode(text: string, label: string): SVGSVGElement {
  const rows = encodeQR(text, 'raw', { border: 3 });
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  const ground = document.createElementNS('http://www.w3.org/2000/svg', 'rect');
  const path = document.createElementNS('http://www.w3.org/2000/svg', 'path');
  svg.setAttribute('viewBox', `0 0 ${rows.length} ${rows.length}`);
  svg.setAttribute('class', 'qr');
  svg.setAttribute('role', 'img');
  svg.setAttribute('aria-label', label);
  ground.setAttribute('width', '100%');
  ground.setAttribute('height', '100%');
  ground.setAttribute('fill', '#fff');
  path.setAttribute('fill', '#000');
  path.setAttribute('d', rows.map((row, y) => row.map((dark, x) => (dark ? `M${x} ${y}h1v1h-1z` : '')).join('')).join(''));
  svg.append(ground, path);
  return svg;
}
