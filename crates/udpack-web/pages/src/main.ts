/** The page: a frame, and in it the tabs that the token may see. */

import { Frame } from './frame/frame.js';
import { language } from './base/text.js';
import { mount as activity } from './dashboard/tab.js';
import { mount as files } from './files/tab.js';
import { mount as upload } from './upload/tab.js';

document.documentElement.lang = language;
const frame = new Frame(document.body, [
  { name: 'upload', icon: 'upload', for: (rights) => rights.write, mount: upload },
  { name: 'files', icon: 'folder', for: (rights) => rights.read, mount: files },
  { name: 'activity', icon: 'activity', for: (rights) => rights.watch, mount: activity },
]);
void frame.run();
