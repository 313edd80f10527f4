/** Why a file was not stored, and what to do about it. */

import { type TransferError } from 'udpack/transfer';
import { texts } from '../base/text.js';

const t = texts(
  'failures',
  {
    bad_name: 'The server does not store files of this name. Rename it and drop it again.',
    blocked: 'A part of this path is a file at the server, not a folder. Rename your folder, or ask the operator.',
    busy: 'Another browser or program uploads the same file. Wait until it is done, then retry.',
    cancelled: 'The operator has ended this upload. Ask them why before you retry.',
    closed: 'The connection was lost for too long. Retry; it goes on where it stopped.',
    exists: 'The name is taken by something else. Rename your file and drop it again, or retry to choose what happens.',
    file: '{path}: {reason}',
    forbidden: 'This link may not do that. Ask whoever sent it.',
    full: 'The disk of the server is full. Ask the operator for room, then retry.',
    hash_mismatch: 'What arrived was not what was sent. Retry.',
    io: 'The disk of the server has failed. Tell the operator, then retry.',
    other: 'The server could not store it. Retry, and tell the operator if it fails again.',
    quota: 'This link has no room left for it. Ask whoever sent the link for more, then retry.',
    refused: 'The operator does not want this file.',
    source_changed: 'The file changed while it was read. Save it, then retry.',
    too_large: 'The file is larger than the server allows. Split it, or ask the operator.',
    too_many_uploads: 'The server has too many uploads open. Wait a little, then retry.',
    unreadable: 'The browser cannot read the file any more. Drop it again.',
  },
  {
    bad_name: '服务器不保存此名称的文件。请重命名后重新拖入。',
    blocked: '此路径的某一部分在服务器上是文件而不是文件夹。请重命名您的文件夹，或询问管理员。',
    busy: '另一个浏览器或程序正在上传同一文件。请等它完成后再重试。',
    cancelled: '管理员已终止此上传。重试前请先询问原因。',
    closed: '连接中断时间过长。请重试，上传将从中断处继续。',
    exists: '名称已被其他内容占用。请重命名后重新拖入，或重试以选择处理方式。',
    file: '{path}：{reason}',
    forbidden: '此链接无权这样做。请询问发送者。',
    full: '服务器磁盘已满。请让管理员腾出空间，然后重试。',
    hash_mismatch: '收到的内容与发送的不一致。请重试。',
    io: '服务器磁盘出错。请通知管理员，然后重试。',
    other: '服务器无法保存。请重试；如果再次失败，请通知管理员。',
    quota: '此链接的空间不足。请向发送者申请更多空间，然后重试。',
    refused: '管理员不接受此文件。',
    source_changed: '读取过程中文件发生了变化。请保存文件后重试。',
    too_large: '文件超过服务器允许的大小。请拆分文件，或询问管理员。',
    too_many_uploads: '服务器同时进行的上传过多。请稍候再重试。',
    unreadable: '浏览器无法再读取该文件。请重新拖入。',
  },
);

/** A sentence that names the file, and says what to do. */
export function explain(path: string, error: TransferError): string {
  return t('file', { path, reason: reasonOf(error) });
}

/** The same without the name. */
export function reasonOf(error: TransferError): string {
  switch (error.reason) {
    case 'no_space':
      return t('full');
    case 'exists':
      return t(error.why === 'blocked' ? 'blocked' : 'exists');
    case 'is_directory':
    case 'not_a_file':
      return t('exists');
    case 'closed':
    case 'lane_closed':
    case 'upload_stalled':
      return t('closed');
    case 'superseded':
    case 'busy':
      return t('busy');
    case 'too_many_requests':
    case 'too_many_uploads':
      return t('too_many_uploads');
    case 'bad_name':
    case 'cancelled':
    case 'forbidden':
    case 'hash_mismatch':
    case 'io':
    case 'quota':
    case 'refused':
    case 'source_changed':
    case 'too_large':
    case 'unreadable':
      return t(error.reason);
    default:
      return t('other');
  }
}
